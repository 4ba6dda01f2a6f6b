"""``python -m genloss_kernels.meters._worker METER SHARE SHARES THOROUGH KNOWN``: one share of a meter, as JSON."""

import json
import sys

from .workers import share_of

if __name__ == "__main__":
    meter, share, shares, thorough, known = sys.argv[1:]
    report = share_of(meter, int(share), int(shares), thorough=thorough == "1", known=json.loads(known))
    json.dump(report, sys.stdout)

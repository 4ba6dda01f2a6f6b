"""``python -m genloss_kernels.meters._worker METER SHARE SHARES THOROUGH``: one share of a meter, as JSON."""

import json
import sys

from .workers import share_of

if __name__ == "__main__":
    meter, share, shares, thorough = sys.argv[1:]
    json.dump(share_of(meter, int(share), int(shares), thorough=thorough == "1"), sys.stdout)

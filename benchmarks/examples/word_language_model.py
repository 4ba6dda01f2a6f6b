"""A word-level language model, an LSTM, on the source of Python's standard library or on any text file.

python benchmarks/examples/word_language_model.py --steps 60
python benchmarks/examples/word_language_model.py --text corpus.txt
"""

import argparse
import collections
import math
import re
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


class RNNModel(nn.Module):
    def __init__(self, vocabulary, width=128, layers=2):
        super().__init__()
        self.encoder = nn.Embedding(vocabulary, width)
        self.rnn = nn.LSTM(width, width, layers)
        self.decoder = nn.Linear(width, vocabulary)
        self.decoder.weight = self.encoder.weight
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)

    def forward(self, tokens, hidden=None):
        output, hidden = self.rnn(self.encoder(tokens), hidden)
        return F.log_softmax(self.decoder(output).flatten(0, 1), dim=1), hidden


def corpus(path, characters, vocabulary):
    """The text's words as numbers, the rare ones as 0."""
    files = [path] if path else sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = ""
    for file in files:
        text += file.read_text(errors="ignore")
        if len(text) > characters:
            break
    words = re.findall(r"\w+|[^\w\s]", text[:characters])
    index = {word: i + 1 for i, (word, _) in enumerate(collections.Counter(words).most_common(vocabulary - 1))}
    return torch.tensor([index.get(word, 0) for word in words]), len(index) + 1


def batchify(data, batch_size):
    rows = len(data) // batch_size
    return data[: rows * batch_size].view(batch_size, rows).t().contiguous()


def main(argv=None):
    parser = argparse.ArgumentParser(description="word-level language model")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--characters", type=int, default=1_000_000)
    parser.add_argument("--vocabulary", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--bptt", type=int, default=35)
    parser.add_argument("--lr", type=float, default=5.0)
    parser.add_argument("--clip", type=float, default=0.25)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data, vocabulary = corpus(args.text, args.characters, args.vocabulary)
    data = batchify(data, args.batch_size).to(device)
    model = RNNModel(vocabulary).to(device)
    criterion = nn.NLLLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr)

    losses, hidden = [], None
    for step in range(args.steps):
        start = step * args.bptt % (len(data) - args.bptt - 1)
        inputs, targets = data[start : start + args.bptt], data[start + 1 : start + args.bptt + 1]
        if start == 0:
            hidden = None
        elif hidden is not None:
            hidden = tuple(h.detach() for h in hidden)
        model.zero_grad()
        output, hidden = model(inputs, hidden)
        loss = criterion(output, targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        losses.append(loss.item())
        if len(losses) % 10 == 0:
            print(f"step {len(losses):4d}  loss {losses[-1]:.4f}  perplexity {math.exp(losses[-1]):.1f}")
    return losses


if __name__ == "__main__":
    main()

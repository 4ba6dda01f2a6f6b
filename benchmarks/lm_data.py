"""Text corpus, byte-level BPE token ids and training batches for train_lm.py."""

import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    """Cached files of one tokenised text, and its size."""

    source: str
    text_bytes: int
    tokens: int
    tokenizer_entries: int
    tokens_path: str
    tokenizer_path: str

    def load_tokens(self) -> Tensor:
        return torch.load(self.tokens_path, weights_only=True)


def prepare_corpus(text: Path | None, max_bytes: int, vocab_size: int, cache_dir: Path) -> Corpus:
    """Tokenise `text` (the Python standard library if None) with a BPE trained on it, or reuse the cached result."""
    documents = list(_read_documents(text, max_bytes))
    key = _cache_key(documents, vocab_size)
    tokenizer_path = cache_dir / f"bpe-{key}.json"
    tokens_path = cache_dir / f"tokens-{key}.pt"
    if tokens_path.exists() and tokenizer_path.exists():
        tokenizer = Tokenizer.from_file(str(tokenizer_path))
        tokens = torch.load(tokens_path, weights_only=True)
    else:
        tokenizer = _train_bpe(documents, vocab_size)
        encodings = tokenizer.encode_batch_fast(documents)
        tokens = torch.cat([torch.tensor(encoding.ids, dtype=torch.int32) for encoding in encodings])
        cache_dir.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(tokenizer_path))
        _save_atomically(tokens, tokens_path)
    return Corpus(
        source=str(text) if text else "Python standard library",
        text_bytes=sum(len(document.encode()) for document in documents),
        tokens=len(tokens),
        tokenizer_entries=tokenizer.get_vocab_size(),
        tokens_path=str(tokens_path),
        tokenizer_path=str(tokenizer_path),
    )


def batches(tokens: Tensor, steps: int, batch: int, seq_len: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield `steps` pairs of inputs and labels, each (batch, seq_len), cut at random from the token stream."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(tokens) - seq_len, (batch,), generator=generator).tolist()
        windows = torch.stack([tokens[start : start + seq_len + 1] for start in starts]).long()
        yield windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def _read_documents(text: Path | None, max_bytes: int) -> Iterator[str]:
    """Yield UTF-8 files in sorted order up to `max_bytes` in all; other encodings and binaries are left out."""
    remaining = max_bytes
    for path in _text_files(text):
        data = path.read_bytes()[:remaining]
        try:
            # The byte limit may cut a character in half, which must not drop the whole file.
            document = data.decode(errors="ignore" if len(data) == remaining else "strict")
        except UnicodeDecodeError:
            continue
        if document:
            yield document
        remaining -= len(data)
        if remaining == 0:
            return


def _text_files(text: Path | None) -> list[Path]:
    if text is not None and text.is_file():
        return [text]
    root = text or Path(sysconfig.get_path("stdlib"))
    pattern = "*" if text else "*.py"
    return sorted(path for path in root.rglob(pattern) if path.is_file() and not _is_skipped(path.relative_to(root)))


def _is_skipped(path: Path) -> bool:
    return any(part in _SKIPPED_FOLDERS or part.startswith(".") for part in path.parts)


def _cache_key(documents: list[str], vocab_size: int) -> str:
    digest = hashlib.sha256(str(vocab_size).encode())
    for document in documents:
        digest.update(hashlib.sha256(document.encode()).digest())
    return digest.hexdigest()[:16]


def _train_bpe(documents: list[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def _save_atomically(tokens: Tensor, path: Path) -> None:
    partial = path.with_suffix(".partial")
    torch.save(tokens, partial)
    os.replace(partial, path)

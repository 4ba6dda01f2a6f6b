"""The outcome of a run: survivors argued to be equivalent, score, text and JSON."""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .source import Mutant

_KEY_FIELDS = ("file", "function", "operator", "original", "mutated")


@dataclass(frozen=True)
class Result:
    mutant: Mutant
    status: str  # killed, timeout, survived, equivalent, or error: nothing was learned
    seconds: float
    detail: str


class Equivalents:
    """Mutants that no test can tell from the original, each with the reason."""

    def __init__(self, path: Path) -> None:
        entries = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        self._why: dict[tuple[str, ...], str] = {}
        for entry in entries:
            missing = [field for field in (*_KEY_FIELDS, "why") if not entry.get(field)]
            if missing:
                raise ValueError(f"{path.name}: an entry lacks {', '.join(missing)}: {entry}")
            self._why[tuple(entry[field] for field in _KEY_FIELDS)] = entry["why"]

    def why(self, mutant: Mutant) -> str | None:
        return self.of(mutant.key)

    def of(self, key: Mapping[str, str]) -> str | None:
        return self._why.get(tuple(key[field] for field in _KEY_FIELDS))

    def stale(self, mutants: list[Mutant]) -> list[str]:
        """Entries about the files of ``mutants`` that match none of them any more."""
        keys = {_key(mutant) for mutant in mutants}
        files = {key[0] for key in keys}
        return [" | ".join(key) for key in self._why if key[0] in files and key not in keys]


def _key(mutant: Mutant) -> tuple[str, ...]:
    key = mutant.key
    return tuple(key[field] for field in _KEY_FIELDS)


def diff(mutant: Mutant) -> str:
    before, after = (data.decode().splitlines() for data in (mutant.source.data, mutant.mutated))
    path = mutant.source.path
    return "\n".join(difflib.unified_diff(before, after, f"a/{path}", f"b/{path}", lineterm="", n=2))


def score(results: list[Result]) -> float | None:
    """Killed over all but the equivalent ones and errors; None where that leaves nothing."""
    return _score(Counter(result.status for result in results))


def _score(counts: Counter[str]) -> float | None:
    killed = counts["killed"] + counts["timeout"]
    return killed / (killed + counts["survived"]) if killed + counts["survived"] else None


def summary(results: list[Result], equivalents: Equivalents) -> str:
    lines: list[str] = []
    for result in results:
        if result.status == "survived":
            entry = json.dumps({**result.mutant.key, "why": ""}, ensure_ascii=False)
            lines += ["", f"SURVIVED {result.mutant.id}", diff(result.mutant), f"key: {entry}"]
        elif result.status == "error":
            lines += ["", f"ERROR {result.detail}: {result.mutant.id}"]
        elif result.status != "equivalent" and equivalents.why(result.mutant) is not None:
            lines += ["", f"NOT EQUIVALENT, {result.detail or result.status} tells: {result.mutant.id}"]
    lines += ["", *_table(results), ""]
    counts = Counter(result.status for result in results)
    value = score(results)
    lines.append(
        f"killed {counts['killed'] + counts['timeout']} (of them {counts['timeout']} by timeout), "
        f"survived {counts['survived']}, equivalent {counts['equivalent']}, errors {counts['error']}; "
        f"score {'none' if value is None else format(value, '.3f')}"
    )
    return "\n".join(lines)


def _table(results: list[Result]) -> list[str]:
    """Killed of counted, per file and per operator."""
    rows: list[str] = []
    for title, name in (("file", lambda r: r.mutant.source.path), ("operator", lambda r: r.mutant.edit.operator)):
        rows.append(f"killed  of  {title}")
        groups: dict[str, list[Result]] = {}
        for result in results:
            groups.setdefault(name(result), []).append(result)
        for group, members in sorted(groups.items()):
            counted = [member for member in members if member.status not in ("equivalent", "error")]
            killed = sum(1 for member in counted if member.status != "survived")
            rows.append(f"{killed:6} {len(counted):3}  {group}")
    return rows


class Earlier:
    """An earlier run, by the document that it wrote, whose survivors and errors are run again."""

    def __init__(self, path: Path) -> None:
        self._document = json.loads(path.read_text(encoding="utf-8"))
        seconds = self._document["baseline_seconds"]
        self.baseline = {tuple(name.split(", ")): value for name, value in seconds.items()}

    def survivors(self, mutants: list[Mutant], equivalents: Equivalents) -> list[Mutant]:
        """Those among ``mutants``, wherever their lines have gone since; one that is argued has met its tests already."""
        for entry in self._document["mutants"]:
            if entry["status"] == "survived" and (why := equivalents.of(entry["key"])) is not None:
                entry |= {"status": "equivalent", "why": why}
        by_key = {_key(mutant): mutant for mutant in reversed(mutants)}
        survived = [entry for entry in self._document["mutants"] if entry["status"] in ("survived", "error")]
        found = [by_key.get(tuple(entry["key"][field] for field in _KEY_FIELDS)) for entry in survived]
        for entry, mutant in zip(survived, found, strict=True):
            if mutant is None:
                print(f"no such mutant any more: {entry['id']}")
        return [mutant for mutant in found if mutant is not None]

    def with_(self, document: dict[str, Any]) -> dict[str, Any]:
        """The earlier document with what is known of its survivors now, and a line on each such pass."""
        now = {tuple(entry["key"].values()): entry for entry in document["mutants"]}
        mutants = [now.get(tuple(entry["key"].values()), entry) for entry in self._document["mutants"]]
        counts = Counter(entry["status"] for entry in mutants)
        passes = [*self._document.get("later_passes", []), {"rerun": len(now), "counts": document["counts"]}]
        found = {"score": _score(counts), "later_passes": passes, "counts": dict(counts), "mutants": mutants}
        return {**self._document, **found}


def document(
    results: list[Result], equivalents: Equivalents, settings: dict[str, Any], baseline: dict[str, float]
) -> dict[str, Any]:
    entries = [
        {
            "id": result.mutant.id,
            "status": result.status,
            "seconds": round(result.seconds, 2),
            "detail": result.detail,
            "why": equivalents.why(result.mutant),
            "key": result.mutant.key,
            "diff": diff(result.mutant),
        }
        for result in results
    ]
    counts = dict(Counter(result.status for result in results))
    seconds = {name: round(value, 2) for name, value in baseline.items()}
    return {**settings, "score": score(results), "counts": counts, "baseline_seconds": seconds, "mutants": entries}


def as_json(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"

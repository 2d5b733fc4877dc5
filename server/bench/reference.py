"""What a reference run said, in a file: for every scored token the distribution over the vocabulary, as much of it as a KL divergence needs.

A line of JSON says what was run; then each window follows as the arrays of `Said`, one behind the other in numpy's own format. Of a token's
distribution the likeliest entries are kept, as few as leave at most 1e-9 of the probability out, in float32; the rest is one number. A peaked
distribution takes some dozen entries instead of the whole vocabulary, and no entry is rounded to fewer than 24 bits.

    KL(p || q) = sum over kept i of p_i (ln p_i - ln q_i) + r (ln r - ln q_r),   r and q_r the mass of the rest in p and in q.

Taking the rest as one is exact but for r * KL(rest of p || rest of q), by the chain rule of KL divergence: at most 1e-9 times a few nats, and
never too much (a lower bound). The kept entries are made to sum to 1 - r again, so rounding enters squared: a run against itself gives about 1e-14.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from server.errors import ConfigError

REST = 1e-9  # the most probability that may be left out
_ARRAYS = 6  # of a Said

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Said:
    """The distributions after some tokens, m of them; the kept entries of all stand one behind the other."""

    nll: NDArray[np.float32]  # [m], of the token that came
    top: NDArray[np.int32]  # [m], the likeliest token
    counts: NDArray[np.int32]  # [m], entries kept
    rest: Floats  # [m], probability left out
    ids: NDArray[np.int32]  # [sum of counts]
    logprobs: NDArray[np.float32]  # [sum of counts]

    @staticmethod
    def of(logprobs: Floats, targets: NDArray[np.int64]) -> Said:
        """logprobs [m, vocab], natural; targets [m], the tokens that came."""
        probabilities = np.exp(logprobs)
        ascending = np.sort(probabilities, axis=1)
        dropped = (np.cumsum(ascending, axis=1) <= REST).sum(axis=1)
        least = np.take_along_axis(ascending, dropped[:, None], axis=1)
        kept = probabilities >= least
        return Said(
            nll=-np.take_along_axis(logprobs, targets[:, None], axis=1)[:, 0].astype(np.float32),
            top=logprobs.argmax(axis=1).astype(np.int32),
            counts=kept.sum(axis=1).astype(np.int32),
            rest=probabilities.sum(axis=1, where=~kept),
            ids=np.nonzero(kept)[1].astype(np.int32),
            logprobs=logprobs[kept].astype(np.float32),
        )

    @staticmethod
    def joined(parts: list[Said]) -> Said:
        """Parts that follow each other."""
        nll, top, counts, rest, ids, logprobs = (np.concatenate(arrays) for arrays in zip(*(part.arrays() for part in parts), strict=True))
        return Said(nll, top, counts, rest, ids, logprobs)

    def arrays(self) -> tuple[NDArray[Any], ...]:
        return self.nll, self.top, self.counts, self.rest, self.ids, self.logprobs

    def part(self, start: int, stop: int) -> Said:
        """The distributions start .. stop - 1."""
        ends = np.concatenate(([0], np.cumsum(self.counts)))
        rows, entries = slice(start, stop), slice(ends[start], ends[stop])
        return Said(self.nll[rows], self.top[rows], self.counts[rows], self.rest[rows], self.ids[entries], self.logprobs[entries])

    def kl(self, logprobs: Floats) -> Floats:
        """KL divergence [m], in nats, of what another model says (logprobs [m, vocab], natural) from this."""
        rows = np.repeat(np.arange(self.counts.size), self.counts)
        theirs = logprobs[rows, self.ids]
        p = np.exp(self.logprobs.astype(np.float64))
        p *= ((1 - self.rest) / self._sums(rows, p))[rows]
        kept = self._sums(rows, p * (np.log(p) - theirs))
        q_rest = np.maximum(1 - self._sums(rows, np.exp(theirs)), np.finfo(np.float64).tiny)
        rest = self.rest * np.log(np.where(self.rest > 0, self.rest, 1.0) / q_rest)
        return np.asarray(kept + np.where(self.rest > 0, rest, 0.0))

    def _sums(self, rows: NDArray[np.int64], values: Floats) -> Floats:
        """Sums [m] over each distribution's entries."""
        return np.asarray(np.bincount(rows, weights=values, minlength=self.counts.size), np.float64)


class ReferenceWriter:
    """Takes window after window. A file that is there is gone on with, behind its first `windows` windows."""

    def __init__(self, path: Path, setting: Mapping[str, Any], windows: int) -> None:
        """Raises ConfigError when the file is of another run or has fewer windows than are done."""
        end = _end_of(path, setting, windows) if windows or path.exists() else 0
        try:
            self._file: IO[bytes] = path.open("ab")
            self._file.truncate(end)
            if end == 0:
                self._file.write(json.dumps(dict(setting)).encode() + b"\n")
        except OSError as error:
            raise ConfigError(f"Cannot write --save_reference {path}: {error.strerror}. Choose another place.") from None

    def append(self, said: Said) -> None:
        """The next window; it is in the file when this returns."""
        for array in said.arrays():
            np.save(self._file, array, allow_pickle=False)
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class ReferenceReader:
    """What a reference run was, and its windows in order."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError where the file cannot be read or is no reference."""
        self._path = path
        try:
            self._file = path.open("rb")
            self.setting: dict[str, Any] = json.loads(self._file.readline())
            if "text" not in self.setting:
                raise ValueError
        except OSError as error:
            raise ConfigError(f"Cannot read {path}: {error.strerror}. Give a file that `moespan eval text --save_reference` wrote.") from None
        except (ValueError, TypeError):
            raise ConfigError(f"{path} is no reference. Give a file that `moespan eval text --save_reference` wrote.") from None

    def __iter__(self) -> Iterator[Said]:
        """Every whole window that is left. Raises ConfigError at one that is cut short."""
        while self._file.peek(1):
            try:
                yield Said(*(np.load(self._file, allow_pickle=False) for _ in range(_ARRAYS)))
            except (ValueError, EOFError, OSError):
                raise ConfigError(f"{self._path} is cut short or damaged. Finish its run with the same command, or make it again.") from None

    def tell(self) -> int:
        """Bytes read."""
        return self._file.tell()

    def close(self) -> None:
        self._file.close()


def _end_of(path: Path, setting: Mapping[str, Any], windows: int) -> int:
    """Where the first `windows` windows end."""
    reader = ReferenceReader(path)
    try:
        if reader.setting != dict(setting):
            raise ConfigError(f"{path} is the reference of another run. Choose another place for --save_reference.")
        found = sum(1 for _ in itertools.islice(reader, windows))
        if found < windows:
            raise ConfigError(f"{path} has {found} windows, but {windows} are done already. Remove it and the run's --out file, and start again.")
        return reader.tell()
    finally:
        reader.close()

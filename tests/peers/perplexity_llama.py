"""moespan's logits beside llama.cpp's on the same file and the same token ids: perplexity, KL divergence, the share of equal first tokens.

    LLAMA_CPP_LIB_PATH=llama-build/bin PYTHONPATH=llama_cpp_python-0.3.36 \\
        .venv/bin/python tests/peers/perplexity_llama.py MODEL.gguf --tokens 2000 [--chats] [--threads 2] [--json]

The archive of docs/performance.md gives both: the library that was built from it and its Python binding (which needs `pip install diskcache`).
The ids are random, in windows of --window; with --chats they are the chats that ship (server/bench/chats.jsonl), held-out questions with their thinking in
the model's own template, each a window, so many that --tokens are reached. Each window begins with an empty KV cache, which ours keep in float16 as
llama.cpp does.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from server.bench.windows import chat_windows
from server.config import EngineConfig
from server.engine.engine import LocalEngine
from server.engine.gguf.names import TOKEN_EMBD
from server.engine.gguf.reader import GGUFFile, find_gguf
from server.engine.kv_cache import PAGE_SIZE
from server.engine.loader import load_model
from server.engine.protocol import Step
from server.text.load import load_template, load_tokenizer

Window = tuple[int, ...]  # token ids
Logits = NDArray[np.float32]  # [n, vocab], after each of n tokens


def main(argv: Sequence[str] | None = None) -> int:
    """Run both, window by window, and print what they differ by."""
    args = _parse(argv)
    file = GGUFFile.open(find_gguf(args.model))
    windows = chats(file, args.tokens) if args.chats else random_ids(file, args.tokens, args.window, args.seed)
    longest = max(map(len, windows))
    ours, theirs = open_ours(file, longest, args.threads), open_llama(args.model, longest, args.threads)
    result = compare(windows, lambda window: run_ours(ours, window), theirs)
    print(json.dumps(result, indent=2) if args.json else "\n".join(f"{name:28} {value:.6g}" for name, value in result.items()))
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the GGUF file that both run")
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--window", type=int, default=250, help="of random ids")
    parser.add_argument("--chats", action="store_true", help="the chats that ship instead of random ids")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(argv)


def random_ids(file: GGUFFile, tokens: int, window: int, seed: int) -> list[Window]:
    """Of the whole vocabulary: control tokens too."""
    ids = np.random.default_rng(seed).integers(0, file.tensors[TOKEN_EMBD].shape[0], tokens)
    return [tuple(part.tolist()) for part in np.split(ids, range(window, tokens, window))]


def chats(file: GGUFFile, tokens: int) -> list[Window]:
    """The first of the chats that ship, until there are so many tokens. Questions are scored too: of the replies a good model is nearly sure."""
    tokenizer = load_tokenizer(file.metadata)
    windows = [window.ids for window in chat_windows(tokenizer, load_template(file.metadata, tokenizer))]
    before = np.cumsum([0, *map(len, windows)])
    return [window for window, start in zip(windows, before, strict=False) if start < tokens]


def open_ours(file: GGUFFile, window: int, threads: int) -> LocalEngine:
    """Our engine with room for one window."""
    config = EngineConfig(cpu_infer=threads, cache_lens=-(-window // PAGE_SIZE) * PAGE_SIZE, prefill_chunk=window)
    return load_model(file, config).engine


def run_ours(engine: LocalEngine, window: Window) -> Logits:
    """The logits after each token of a window."""
    return engine.logits(Step(window, 0, tuple(range(engine.num_pages)), None)).numpy()


def open_llama(model: Path, window: int, threads: int) -> Callable[[Window], Logits]:
    """llama.cpp with its defaults, as a function from a window's tokens to their logits."""
    import llama_cpp as api  # the archive's binding

    api.llama_backend_init()
    model_params, params = api.llama_model_default_params(), api.llama_context_default_params()
    model_params.n_gpu_layers = 0
    params.n_ctx = params.n_batch = params.n_ubatch = window
    params.n_threads = params.n_threads_batch = threads
    loaded = api.llama_model_load_from_file(str(model).encode(), model_params)
    context = api.llama_init_from_model(loaded, params)
    if not context:
        sys.exit("llama.cpp cannot load this file")
    vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(loaded))

    def run(window_ids: Window) -> Logits:
        n = len(window_ids)
        api.llama_memory_clear(api.llama_get_memory(context), True)
        batch = api.llama_batch_init(n, 0, 1)
        for i, token_id in enumerate(window_ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token_id, i, 1, 0, True
        batch.n_tokens = n
        if api.llama_decode(context, batch) != 0:
            sys.exit("llama.cpp failed to run the tokens")
        logits: Logits = np.ctypeslib.as_array(api.llama_get_logits(context), (n, vocab)).copy()
        api.llama_batch_free(batch)
        return logits

    return run


def compare(windows: Sequence[Window], ours: Callable[[Window], Logits], theirs: Callable[[Window], Logits]) -> dict[str, float]:
    """Perplexity of each on the tokens that follow, and how far their distributions are apart."""
    rows = [row for window in windows for row in _rows(window, ours(window), theirs(window))]
    nll_ours, nll_theirs, kl, same, error, norm = np.array(rows).T
    return {
        "perplexity, moespan": math.exp(nll_ours.mean()),
        "perplexity, llama.cpp": math.exp(nll_theirs.mean()),
        "ratio": math.exp(nll_ours.mean() - nll_theirs.mean()),
        "KL, mean": float(kl.mean()),
        "KL, 99 %": float(np.quantile(kl, 0.99)),
        "same first token": float(same.mean()),
        "relative error of the logits": math.sqrt(error.sum() / norm.sum()),
    }


def _rows(window: Window, ours: Logits, theirs: Logits) -> Iterator[tuple[float, ...]]:
    """For each position with a token after it: both losses, KL(llama.cpp, ours), same first token, squared error and norm of centred logits."""
    for i, following in enumerate(window[1:]):
        a, b = (logits[i].astype(np.float64) - logits[i].mean() for logits in (ours, theirs))
        log_a, log_b = (x - np.logaddexp.reduce(x) for x in (a, b))
        kl = float((np.exp(log_b) * (log_b - log_a)).sum())
        yield -log_a[following], -log_b[following], kl, float(a.argmax() == b.argmax()), float(((a - b) ** 2).sum()), float((b**2).sum())


if __name__ == "__main__":
    sys.exit(main())

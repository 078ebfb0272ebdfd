"""vLLM itself, without a clock of its own: requests go in, `step` decodes one token for all.

Everything that is vLLM's, its arguments, its traps and its names, is in this file; when to step, which version to
serve and whether to believe it is said in `vllm.py`. Written against vLLM 0.32.

It works in this process; where torch.distributed belongs to a learner on several ranks, in one of its own. One thread
makes, steps and closes a core. The log-probabilities are those of the processed distribution; vLLM's
default is the raw one.
"""

from __future__ import annotations

import gc
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch

from espl_envs.core.errors import EsplError, MissingExtra
from espl_train.config import EngineConfig, ModelConfig
from espl_train.engines.adapters import Adapter
from espl_train.engines.base import EngineError, Request, Sample
from espl_train.learner.loading import precision

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
SETTINGS = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
}
LOGPROBS = "processed_logprobs"
CPU_PREFILL = 4096         # tokens in one step, or one prompt where that is longer
CPU_BLOCK = 32             # tokens of a block of keys and values: the grain in which prefixes are shared

ALONE, BESIDE = 0.9, 0.5   # of a GPU's memory

Pause = Literal["sleep", "kv", "keep"]
Scores = list[float]


@dataclass(frozen=True, slots=True)
class Score:
    """Asks for the log-probabilities (T=1) of tokens[start:], each given all before it; at least two tokens."""

    tokens: tuple[int, ...]
    start: int
    policy: int | None


def rank_served(rank: int) -> int:
    """The smallest rank that vLLM reserves room for and that holds adapters of `rank`. Raises EsplError above all."""
    for served in RANKS:
        if rank <= served:
            return served
    raise EsplError(
        f"learner.rank is {rank}, but vLLM serves adapters of rank {RANKS[-1]} at most; lower it, or sample with "
        "--engine local"
    )


def share(config: EngineConfig) -> float:
    """The share of a GPU that vLLM takes: of its own most, beside the learner half."""
    return config.gpu_memory or (ALONE if config.replicas else BESIDE)


def free_gpus() -> list[str]:
    """The GPUs of this machine that no learner has, by the names that CUDA_VISIBLE_DEVICES knows."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    return names[int(os.environ.get("LOCAL_WORLD_SIZE", "1")) :]


def installed() -> None:
    """Raises MissingExtra where vLLM is not there."""
    if find_spec("vllm") is None:
        raise MissingExtra("vllm", "engine.kind = 'vllm'")


class Core:
    """One vLLM engine: a base model and at most one adapter. Raises EsplError where it cannot be set up."""

    def __init__(
        self, model: str, settings: ModelConfig, config: EngineConfig, *, rank: int, targets: Sequence[str],
        context: int, device: torch.device, kv_bytes: int | None,
    ) -> None:
        installed()
        self.device = device
        self._adapter: Adapter | None = None
        self._engine: Any = None
        self._asked: dict[str, Request | Score] = {}
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(torch.distributed.is_initialized()))
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        self._tidy()
        with _undisturbed():
            try:
                common = self._arguments(model, settings, config, context, kv_bytes)
                self._engine = _built({**common, **_lora(rank, targets, self.device)})
            except (ValueError, RuntimeError, OSError, AssertionError, ImportError) as error:
                said = _said(error)
                knobs = "; engine.gpu_memory, engine.kv_gb and engine.context decide" if "memory" in said else ""
                raise EsplError(f"vLLM cannot be set up for '{settings.path}': {said}{knobs}") from error
        self._vocabulary = int(self._engine.model_config.get_vocab_size())

    def _arguments(
        self, model: str, settings: ModelConfig, config: EngineConfig, context: int, kv_bytes: int | None
    ) -> dict[str, Any]:
        return {
            "model": model,
            "revision": settings.revision,
            "dtype": precision(settings),
            "skip_tokenizer_init": True,
            "generation_config": "vllm",                # the model's own would change how it is sampled
            "max_model_len": context,
            "max_num_seqs": config.slots,
            "enable_prefix_caching": True,
            "logprobs_mode": LOGPROBS,
            "kv_cache_memory_bytes": kv_bytes,
            "use_tqdm_on_load": False,
            "disable_log_stats": True,
            **(_on_gpu(config) if self.device.type == "cuda" else _on_cpu(context)),
        }

    def add(self, key: str, asked: Request | Score) -> None:
        """Begin a request. Raises ValueError where vLLM does not take it."""
        tokens = asked.tokens[:-1] if isinstance(asked, Score) else asked.tokens
        if not (min(asked.tokens) >= 0 and max(asked.tokens) < self._vocabulary):     # vLLM would read past its table
            raise ValueError(f"token ids run from 0 to {self._vocabulary - 1}, here to {max(asked.tokens)}")
        self._engine.add_request(key, {"prompt_token_ids": list(tokens)}, _parameters(asked),
                                 lora_request=self._request(asked.policy))
        self._asked[key] = asked

    def step(
        self, fresh: Sequence[tuple[str, Request | Score]] = (), gone: Sequence[str] = ()
    ) -> list[tuple[str, Sample | Scores | EngineError]]:
        """Begin `fresh` requests, forget those that nobody waits for, then one token for every request that fits.
        Returns what has ended, by key: an EngineError where vLLM does not take a request."""
        if gone:
            self._engine.abort_request(list(gone))
        for key in gone:
            self._asked.pop(key, None)
        refused: list[tuple[str, Sample | Scores | EngineError]] = []
        for key, asked in fresh:
            try:
                self.add(key, asked)
            except ValueError as error:                   # the engine is fine
                refused.append((key, EngineError(f"vLLM refuses the request: {error}")))
        ended = [out for out in self._engine.step() if out.finished and out.request_id in self._asked]
        return [*refused, *((out.request_id, result(self._asked.pop(out.request_id), out)) for out in ended)]

    @property
    def busy(self) -> bool:
        """Whether requests are under way."""
        return bool(self._engine.has_unfinished_requests())

    def complete(self, asked: Sequence[Request | Score]) -> list[Any]:
        """Begin these and step until all have ended; nothing else may be under way."""
        for number, one in enumerate(asked):
            self.add(f"complete-{number}", one)
        done: dict[str, Any] = {}
        while self.busy:
            done |= dict(self.step())
        return [done[f"complete-{number}"] for number, _ in enumerate(asked)]

    def load(self, adapter: Adapter) -> None:
        """Serve `adapter` in place of the one before; keys and values computed with that one are forgotten."""
        self.unload()
        self._adapter = adapter
        try:
            self._engine.add_lora(self._request(adapter.version))
        except (ValueError, RuntimeError, OSError) as error:
            raise EngineError(f"vLLM does not take adapter {adapter.name}: {_said(error)}") from error

    def unload(self) -> None:
        """Serve the base model alone."""
        self._drain()
        if self._adapter is not None:
            self._engine.remove_lora(self._adapter.id)
        self._adapter = None
        self._engine.reset_prefix_cache()

    def sleep(self, how: Pause) -> None:
        """Give memory back; nothing may be under way. Keys and values are lost in any case but 'keep'."""
        if self.device.type != "cuda" or how == "keep":
            return
        self._drain()
        if how == "sleep":
            self._engine.sleep(level=1)                 # level 2 would throw the adapters away
        else:
            self._engine.sleep(level=0)
            self._engine.release_kv_cache_memory()

    def wake(self) -> None:
        """Take it back. What is served afterwards must be proven again: adapters have come back damaged."""
        if self.device.type == "cuda" and self._engine.is_sleeping():
            self._tidy()
            self._engine.wake_up()

    def close(self) -> None:
        """Release the memory. May be repeated."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.engine_core.shutdown()
            del engine
            self._tidy()

    def _tidy(self) -> None:
        """Let the GPU have what this process has freed and torch holds back: vLLM looks at what is free, and it cannot
        be set up a second time, nor in another process, before the memory of the first is really gone."""
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def _drain(self) -> None:
        """Finish the step that vLLM has begun ahead for requests that have ended meanwhile."""
        ahead = getattr(self._engine.engine_core, "engine_core", None)      # where it works in this process
        while ahead is not None and ahead.batch_queue:
            self._engine.step()

    def _request(self, policy: int | None) -> Any:
        from vllm.lora.request import LoRARequest

        if policy is None:
            return None
        if self._adapter is None or self._adapter.version != policy:
            raise EngineError(f"policy {policy} is not loaded")
        return LoRARequest(self._adapter.name, self._adapter.id, str(self._adapter.path))


def result(asked: Request | Score, out: Any) -> Sample | Scores:
    """What the caller asked for, out of vLLM's output for it."""
    (completion,) = out.outputs
    if isinstance(asked, Score):
        given = out.prompt_logprobs
        scores = [given[i][asked.tokens[i]].logprob for i in range(asked.start, len(asked.tokens) - 1)]
        return [*scores, completion.logprobs[0][asked.tokens[-1]].logprob]
    tokens = tuple(completion.token_ids)
    values = tuple(at[token].logprob for token, at in zip(tokens, completion.logprobs, strict=True))
    return Sample(tokens, values, "stop" if tokens[-1] in asked.stop_ids else "length", asked.policy)


def _parameters(asked: Request | Score) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    settings: dict[str, Any] = {
        "detokenize": False, "ignore_eos": True, "output_kind": RequestOutputKind.FINAL_ONLY,
    }
    if isinstance(asked, Score):
        return SamplingParams(
            temperature=0.0, max_tokens=1, prompt_logprobs=0, logprobs=1, logprob_token_ids=[asked.tokens[-1]],
            **settings,
        )
    return SamplingParams(
        temperature=asked.temperature, top_p=asked.top_p, seed=asked.seed, max_tokens=asked.max_new,
        stop_token_ids=list(asked.stop_ids), logprobs=0, **settings,
    )


def _on_gpu(config: EngineConfig) -> dict[str, Any]:
    sleeps = config.pause != "keep" and not config.replicas
    return {"gpu_memory_utilization": share(config), "enable_sleep_mode": sleeps}


def _on_cpu(context: int) -> dict[str, Any]:
    """Prompts are taken whole: after a part of one, vLLM winds back the request's random stream, which CPUs cannot."""
    return {
        "enable_chunked_prefill": False, "max_num_batched_tokens": max(context, CPU_PREFILL), "block_size": CPU_BLOCK,
    }


def _lora(rank: int, targets: Sequence[str], device: torch.device) -> dict[str, Any]:
    """Room for one adapter of these layers. Not of the head: vLLM would compute prompt log-probabilities without it.

    On CPUs a request without adapter reads the last slot, -1, when others in its batch have one: it is kept empty.
    """
    return {
        "enable_lora": True,
        "max_loras": 2 if device.type == "cpu" else 1,
        "max_lora_rank": rank_served(rank),
        "lora_target_modules": list(targets),
    }


def _built(arguments: dict[str, Any]) -> Any:
    from vllm import EngineArgs, LLMEngine

    from espl_train.engines.vllm_process import mortal

    with mortal():
        return LLMEngine.from_engine_args(EngineArgs(**arguments))


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Set up without chatter, with torch's own choice of threads for this thread too, and with `set_num_threads` as it
    was: vLLM takes it away on CPUs.
    """
    original, level = torch.set_num_threads, logging.root.manager.disable
    original(torch.get_num_threads())
    logging.disable(max(level, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        torch.set_num_threads = original


def _said(error: BaseException) -> str:
    """vLLM's reason: the innermost cause, its first line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]

"""Makes bad calls and judges what comes of each: ``python bad_calls_run.py SHARD SHARDS CALLS JOURNAL``.

In a process of its own, so that a crash is one: the call that runs is the journal's last line. Prints a report.
"""

from __future__ import annotations

import faulthandler
import random
import re
import resource
import sys
import traceback
import warnings
from collections import Counter
from typing import Any

import torch
from bad_calls import Call, direct_ops, model_calls, public_ops, tiny_model
from bad_values import SURELY_BAD, describe, spoiled
from golden import load_golden
from torch import Tensor
from torch.utils._pytree import tree_leaves

import varkern
from varkern.engine import generate as _  # noqa: F401

# What messages call the arguments whose names are the published model's.
ALIASES = {
    "f_BChw": ("features",),
    "inp_img_no_grad": ("images",),
    "x": ("images",),
    "inp": ("images",),
    "h_BChw": ("codes", "embeddings"),
    "ms_idx_Bl": ("tokens", "token"),
    "gt_ms_idx_Bl": ("tokens", "token", "indices"),
    "ms_h_BChw": ("embeddings",),
    "v_patch_nums": ("patch_nums", "schedule"),
    "SN": ("scales",),
    "si": ("scale",),
    "label_B": ("labels",),
    "label": ("labels",),
    "tokens": ("keep",),
    "mask": ("keep",),
    "seed": ("seed",),
    "g_seed": ("seed",),
}
DTYPE_NAMES = {torch.float16: "Half", torch.float64: "Double", torch.bfloat16: "BFloat16"}
# (argument, kind) that a function may take after all.
LEGAL = {(name, "rank") for name in ("q_bias", "v_bias", "log_scale")}
LEGAL |= {(name, "no tensor") for name in ("q_bias", "v_bias", "log_scale", "labels", "label_B", "label")}
LEGAL |= {(name, "no number") for name in ("labels", "label_B", "label", "seed", "g_seed")}
LEGAL |= {(name, "no list") for name in ("v_patch_nums", "labels", "label_B")}
LEGAL |= {("mask", "8-bit float"), ("mask", "other dtype"), ("cond_BD", "rank")}
LEGAL |= {("following", "empty list"), ("following", "no list"), ("noise", "no tensor")}
LEGAL |= {(name, "huge number") for name in ("seed", "g_seed", "labels", "label_B", "label")}
LEGAL |= {("seed", "no list"), ("max_batch", "no number"), ("guidance", "no number")}
LEGAL |= {("residual", "no tensor"), ("bias", "no tensor"), ("norm", "no list"), ("softmax_scale", "no number")}
ENGINE_ONLY = "a seed for each image needs the engine"  # what the reference does not have at all
CLEAR = (ValueError, TypeError, RuntimeError, IndexError)
MEMORY = 24 << 30  # of address space: what asks for more gets an error and no machine that swaps
CODES = 512  # of the larger model
EVERY = 100  # bad calls before the next good one
BACKENDS = (None, "cpu", "reference")


def words(call: Call) -> set[str]:
    names = {*call.arguments, *call.fixed, *re.findall(r"\w+", call.name)} - {"ops", "torch"}
    names |= {alias for name in call.arguments for alias in ALIASES.get(name, ())}
    return {
        part for name in names for part in (name.lower(), *name.lower().split("_")) if len(part) > 2 or part in "hxqkv"
    }


def useful(error: BaseException, call: Call, values: list[Any]) -> bool:
    """Whether the message is a sentence that names an argument, the function or what is wrong with the value."""
    text = str(error)
    found = set(re.findall(r"[a-z0-9]+", text.lower()))
    if len(text.split()) < 5:
        return False
    if found & words(call):
        return True
    for value in values:
        told = [repr(value), type(value).__name__]
        if isinstance(value, Tensor):
            told = [str(tuple(value.shape)), str(list(value.shape)), "x".join(map(str, value.shape)), str(value.device)]
            told += [str(value.dtype), DTYPE_NAMES.get(value.dtype, str(value.dtype))]
            told += ["sparse", "Sparse"] * (value.layout != torch.strided)
        elif isinstance(value, list | tuple):
            told.append(str(len(value)))
        if any(piece in text for piece in told):
            return True
    return False


def same(got: Any, want: Any, coarse: bool = False, poisoned: bool = False) -> bool:
    """Whether two results are one; ``coarse``: 16 bits went in, ``poisoned``: NaN or an infinity did."""
    if isinstance(got, Tensor) and isinstance(want, Tensor):
        if got.shape != want.shape or got.dtype != want.dtype or got.device != want.device:
            return False
        if got.device.type == "meta":
            return True
        if not got.is_floating_point():  # any code is as near as any other to NaN
            return bool(((got >= 0) & (got < CODES)).all()) if poisoned else torch.equal(got, want)
        tolerance = 3e-2 if coarse or got.dtype not in (torch.float32, torch.float64) else 1e-4
        got, want = (t.detach().as_subclass(Tensor).double() for t in (got, want))
        # Times a weight of 0, NaN comes of what nobody looks at, and PyTorch's own attention loses some NaN: what must
        # become of them is the subject of tests of their own.
        certain = got.isfinite() & want.isfinite() if poisoned else torch.ones_like(want, dtype=torch.bool)
        return torch.allclose(got[certain], want[certain], rtol=tolerance, atol=tolerance, equal_nan=True)
    if isinstance(got, list | tuple):
        return len(got) == len(want) and all(same(a, b, coarse, poisoned) for a, b in zip(got, want, strict=True))
    if hasattr(got, "tokens"):
        return same([*got.tokens, got.images], [*want.tokens, want.images], coarse, poisoned)
    return type(got) is type(want)


def copied(value: Any) -> Any:
    """A deep copy that shares no memory, with the strides and all that is odd about a tensor."""
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.device.type == "meta" or value.numel() > 1 << 24:
            return value
        span = sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True)) + 1 if value.numel() else 0
        flat = value.detach().as_subclass(Tensor).as_strided((span,), (1,)).clone()
        copy = flat.as_strided(value.shape, value.stride(), 0).as_subclass(type(value))
        return copy.requires_grad_() if value.requires_grad else copy
    if isinstance(value, torch.Generator):
        return value.clone_state()
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(copied, value))
    if type(value) in (list, tuple):
        return type(value)(map(copied, value))
    return value


def state() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        varkern.current_backend(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_num_threads(),
        torch.is_autocast_enabled("cpu"),
    )


class Judge:
    def __init__(self, journal: str) -> None:
        self.journal = open(journal, "w", buffering=1)  # noqa: SIM115 (open until the process ends)
        self.failures: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self.outcomes: Counter[str] = Counter()

    def fail(self, call: Call, what: str, line: str) -> None:
        key = f"{call.name}: {what}"
        self.failures[key] += 1
        self.examples.setdefault(key, line)

    def judge(self, call: Call, backend: str | None, rng: random.Random) -> None:
        kinds, tensors = {}, sum(isinstance(leaf, Tensor) for leaf in tree_leaves(call.arguments))
        for name in rng.sample(sorted(call.arguments), min(len(call.arguments), rng.choice((1, 1, 1, 2)))):
            kind, call.arguments[name] = spoiled(rng, call.arguments[name])
            kinds[name] = kind
        line = f"{call.name} on {backend}: " + ", ".join(
            f"{n} = {describe(call.arguments[n])} ({kinds[n]})" for n in kinds
        )
        self.journal.write(line + "\n")
        values = [call.arguments[name] for name in kinds]
        before = copied({**call.arguments}.values() and list(call.arguments.values()))
        twin = Call(call.name, call.function, dict(zip(call.arguments, copied(before), strict=True)), dict(call.fixed))
        grad, rng_state = torch.is_grad_enabled(), torch.get_rng_state()
        got, error = self.run(call, backend)
        if error is not None:
            self.outcomes["raised"] += 1
            if not isinstance(error, CLEAR):
                where = traceback.extract_tb(error.__traceback__)[-1]
                self.fail(
                    call,
                    f"{type(error).__name__} for {'+'.join(kinds.values())}: {error!s:.60}",
                    f"{line}\n    {where.filename}:{where.lineno}: {error!s:.300}",
                )
            elif not useful(error, call, values):
                self.fail(call, f"useless {type(error).__name__}: {error!s:.60}", f"{line}\n    {error!s:.300}")
            for name, old in zip(call.arguments, before, strict=True):
                new = call.arguments[name]
                if (
                    isinstance(new, Tensor)
                    and isinstance(old, Tensor)
                    and new.layout == torch.strided
                    and new.numel() < 1 << 24
                    and not same(new, old)
                ):
                    self.fail(call, f"{name} was written although the call raised", f"{line}\n    {error!s:.300}")
            return
        self.outcomes["returned"] += 1
        legal = {*LEGAL, *(((name, "meta") for name in kinds) if tensors == 1 else ())}  # all that there is
        taken = [f"{k} for {n}" for n, k in kinds.items() if k in SURELY_BAD and (n, k) not in legal]
        if taken:
            self.fail(call, f"takes {'+'.join(taken)}", line)
        if backend == "reference" or not call.comparable:
            return
        torch.set_grad_enabled(grad)
        after = torch.get_rng_state()
        torch.set_rng_state(rng_state)
        want, error = self.run(twin, "reference")
        torch.set_rng_state(after)
        if error is not None:
            if not str(error).startswith(ENGINE_ONLY):
                self.fail(call, f"the reference refuses {'+'.join(kinds.values())}: {error!s:.80}", line)
            return
        got, want = call.compared(got), call.compared(want)
        coarse = any(isinstance(v, Tensor) and v.dtype in (torch.float16, torch.bfloat16) for v in values)
        if not same(got, want, coarse, bool({"no finite values", "not finite", "large"} & set(kinds.values()))):
            self.fail(
                call,
                f"another result for {'+'.join(f'{k} for {n}' for n, k in kinds.items())}",
                f"{line}\n    got {describe(got):.300}\n    want {describe(want):.300}",
            )

    def run(self, call: Call, backend: str | None) -> tuple[Any, BaseException | None]:
        if "backend" in call.fixed:
            call.fixed["backend"] = backend
        try:
            with varkern.use_backend(backend):
                return call.run(), None
        except Exception as error:
            return None, error


def main() -> int:
    shard, shards, calls, journal = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    golden, tiny = load_golden("d2"), tiny_model()
    var, decode = golden.var, golden.vae.fhat_to_img
    judge = Judge(journal)
    tokens = torch.cat(varkern.generate(tiny, 2, 1, 0, top_k=5).tokens, 1)
    rest = state()

    def check_good(line: str) -> None:
        good = varkern.generate(var, 2, golden["labels"], golden.config["seed"], **golden.sampling)
        assert torch.equal(torch.cat(good.tokens, 1), golden["sample_tokens"]), f"other tokens after {line}"
        good = varkern.generate(tiny, 2, 1, 0, top_k=5)
        assert torch.equal(torch.cat(good.tokens, 1), tokens), f"other tokens after {line}"
        assert not any(b.attn.caching or b.attn.cached_k is not None for m in (var, tiny) for b in m.blocks), line

    # The decoder is most of the time and has no part in the tokens; the last good call has it.
    golden.vae.fhat_to_img = lambda f_hat: torch.zeros(f_hat.shape[0], 3, 1, 1)
    for number in range(shard, calls, shards):
        rng = random.Random(number)
        torch.manual_seed(number)
        backend = rng.choice(BACKENDS)
        kind = rng.random()
        if kind < 0.3:
            make = rng.choice(public_ops(rng))
        elif kind < 0.6:
            make = rng.choice(direct_ops(rng, backend))
        elif kind < 0.95:
            make = rng.choice(model_calls(rng, tiny))
        else:
            make = rng.choice(model_calls(rng, var)[:5])
        grad = rng.random() < 0.7
        torch.set_grad_enabled(grad)
        judge.judge(make(), backend, rng)
        assert torch.is_grad_enabled() == grad, f"the grad mode has changed, call {number}"
        torch.set_grad_enabled(True)
        assert state() == rest, f"the global state is {state()}, was {rest}, call {number}"
        if number // shards % EVERY == EVERY - 1:
            check_good(f"call {number}")
    del golden.vae.fhat_to_img
    check_good("the last")
    good = varkern.generate(var, 2, golden["labels"], golden.config["seed"], **golden.sampling)
    assert torch.allclose(good.images, golden["sample_image"], rtol=0, atol=1e-3)
    assert golden.vae.fhat_to_img == decode
    print(dict(judge.outcomes))
    for key, count in judge.failures.most_common():
        print(f"{count:4d} {key}\n     {judge.examples[key]}")
    return 1 if judge.failures else 0


if __name__ == "__main__":
    sys.exit(main())

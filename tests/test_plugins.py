"""`plugins.Deferred`: the module itself, from its first use on."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from opd.plugins import Deferred
from opd.types import Prompt, Rollout, Unwritten


def test_deferred_is_the_module_after_first_use(monkeypatch: pytest.MonkeyPatch):
    module = Deferred("math")
    assert module.pi is math.pi
    monkeypatch.setattr(math, "pi", 3)
    assert module.pi == 3
    with pytest.raises(AttributeError, match="no attribute 'pie'"):
        module.pie  # noqa: B018


def test_deferred_imports_at_first_use_alone():
    code = (
        "import sys; from opd.plugins import torch, np; assert not {'torch', 'numpy'} & set(sys.modules); "
        "np.zeros(1); assert 'numpy' in sys.modules; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_methods_are_built_without_torch():
    code = (
        "import sys; from opd.methods import METHODS, build; "
        "options = {'context_distillation': {'system': 'x'}}; "
        "[build(name, options.get(name, {})) for name in METHODS]; "
        "import opd.runs.checks, opd.commands.check, opd.rewards.audit; "
        "print(sorted({'torch', 'transformers', 'numpy', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_unwritten_is_a_rollout_without_tokens():
    one = Unwritten(prompt=Prompt(id=0, content="x"), sample=0, prompt_ids=(), finished=True, text="y")
    assert isinstance(one, Rollout)
    assert (one.reward, one.sampler_logp, dict(one.judged)) == (None, None, {})
    assert one.response_ids.tolist() == one.turn.tolist() == one.trained.tolist() == []
    assert (one.response_ids.dtype, one.turn.dtype, one.trained.dtype) == (torch.int64, torch.int64, torch.bool)
    changed = replace(one, reward=2.0, response_ids=torch.tensor([3]))
    assert (changed.reward, changed.text, changed.response_ids.tolist()) == (2.0, "y", [3])
    with pytest.raises(AttributeError, match="has no 'length'"):
        _ = one.length  # type: ignore[attr-defined]

"""The example of a new post block in the READMEs: its file and its row work as they are printed."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import losses_of, succeed
from test_delta import logits_of
from test_docs import ENGLISH, READMES, ROOT, blocks, prose

from llava.model import post_block
from llava.model.builder import load_pretrained_model
from llava.model.post_block import builder
from llava.train.effect import Effect

ROWS = ROOT / "llava/model/post_block/builder.py"


@pytest.fixture
def registered(tmp_path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The file lies beside the other blocks, and the row is in their table."""
    text = ENGLISH.read_text(encoding="utf-8")
    (code,) = [code for code in blocks(text, "python") if "PostBlock" in code]
    (change,) = blocks(text, "diff")
    named = re.findall(r"`(llava/model/post_block/\w+\.py)`", prose(text))
    (name,) = [Path(file).stem for file in named if not (ROOT / file).exists()]
    added = [line[1:] for line in change.splitlines() if line.startswith("+")]
    kept = [line[1:] for line in change.splitlines() if line.startswith(" ")]
    assert "\n".join(kept) in ROWS.read_text(encoding="utf-8")
    (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
    monkeypatch.setattr(post_block, "__path__", [*post_block.__path__, str(tmp_path)])
    new: dict = {}
    exec(added[0], new)
    (entry,) = eval("{" + added[1] + "}", new).items()
    monkeypatch.setitem(builder.POST_BLOCKS, *entry)
    yield
    del sys.modules[f"{post_block.__name__}.{name}"]


def test_both_languages_show_the_same_code() -> None:
    shown = [[blocks(readme.read_text(encoding="utf-8"), kind) for kind in ("python", "diff")] for readme in READMES]
    assert shown[0] == shown[1]


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.name)
def test_what_the_readme_says_of_blocks_is_so(readme: Path) -> None:
    """Every option with its default, and the line at the end of a run."""
    text = readme.read_text(encoding="utf-8")
    assert str(Effect(None, 0.0533, 0.0267, 128, 27)) in text
    for name, kind in builder.POST_BLOCKS.items():
        (table,) = re.findall(rf"^\|[^|]*`--post_block {name}`[^|]*\|.*\n((?:\|.*\n)+)", text, re.MULTILINE)
        shown = dict(re.findall(r"^\| `(\w+)` \|[^|]*\| (\S+) \|", table, re.MULTILINE))
        assert shown == {f.name: str(f.default).replace("True", "true") for f in dataclasses.fields(kind.Options)}


@pytest.mark.usefixtures("registered")
def test_the_block_of_the_readme_trains(run_script, dpo_flags, tmp_path, golden) -> None:
    """Options come from flags, a fresh one changes no logit, and what it has learned is saved and loads."""
    flags = [*dpo_flags, "--tune", "post_block", "--post_block", "bottleneck"]
    flags += ["--post_block_config", "width=8,gate=channel,depth=2"]
    succeed(run_script("train_dpo", *flags, "--post_block_lr", 1e-30, "--output_dir", tmp_path / "fresh"))
    succeed(run_script("train_dpo", *flags, "--post_block_lr", 1e-3, "--output_dir", tmp_path / "trained"))
    base, fresh, trained = (
        load_pretrained_model(str(folder), None)[1]
        for folder in (golden / "tiny-llava-original", tmp_path / "fresh", tmp_path / "trained")
    )
    settings = {"name": "bottleneck", "depth": 2, "gate": "channel", "width": 8}
    assert trained.config.post_block == fresh.config.post_block == settings
    assert [layer.down.out_features for layer in trained.post_block.layers] == [8, 8]
    torch.testing.assert_close(logits_of(fresh), logits_of(base), atol=1e-6, rtol=0)
    assert (logits_of(trained) - logits_of(base)).abs().max() > 1e-2
    assert min(losses_of(tmp_path / "trained")) < losses_of(tmp_path / "fresh")[0] - 1e-3


@pytest.mark.usefixtures("registered")
def test_wrong_options_of_it_are_refused(run_script, dpo_flags, tmp_path) -> None:
    flags = [*dpo_flags, "--tune", "post_block", "--post_block", "bottleneck", "--output_dir", tmp_path / "out"]
    for options, message in (("width=0", "expected a whole number, 1 or more"), ("widht=8", "did you mean width?")):
        code, _, err = run_script("train_dpo", *flags, "--post_block_config", options)
        assert code == 2 and message in err

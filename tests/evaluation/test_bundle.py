"""Bundles: a test that is replayed without a video, to the last query, and from no file that has changed."""

import hashlib
import itertools
import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from clip_m2df import UserError
from clip_m2df.cli import main
from clip_m2df.episode import IndexedEpisode
from clip_m2df.evaluation.bank import EpisodeBank
from clip_m2df.evaluation.bundle import Facts, read_bundle, write_bundle
from clip_m2df.nn.baselines import HEADS
from clip_m2df.nn.class_text import fuse_text
from clip_m2df.nn.head import Head
from clip_m2df.nn.m2df import M2DFHead
from clip_m2df.training.callbacks import BundleWriter
from tests.conftest import fails, options, quiet_trainer
from tests.evaluation.test_bank import DIM, OPTIONS, SIZES, direct, episodes, make_head, videos, with_unknown
from tests.training.test_evaluation_from_bank import OWN_OPTIONS, data, many  # noqa: F401
from tests.training.test_module import make


class Contrary(M2DFHead):
    """A head of a user's own."""


def facts_of(head: str = "m2df", **changes: Any) -> Facts:
    """How the episodes of these tests were played."""
    of_head = {name: value for name, value in changes.items() if name not in Facts._fields}
    sizes = SIZES.get(head, {})
    plain: dict[str, Any] = {"text_fusion": 0.0, "precision": "32-true", "block": 64, "memory": 4e9, "prompts": True}
    plain |= {"class_names": [f"class {c}" for c in range(7)], "numbers": {}}
    plain |= {name: value for name, value in changes.items() if name in Facts._fields}
    return Facts(head, sizes | of_head, **plain)


def with_more(played: IndexedEpisode) -> IndexedEpisode:
    """The episodes with two unknown queries each, and some of their queries having twins."""
    twins = torch.rand(played["query"].shape, generator=torch.Generator().manual_seed(1)) < 0.3
    return IndexedEpisode(**{**with_unknown(played, 2), "twins": twins})


def predictions(head: Head, played: IndexedEpisode, share: float) -> dict[str, Tensor]:
    """The scores of all queries by the head as a whole."""
    features, prompts = videos()
    table, scores = prompts[played["class_indices"]], {}
    unknown = IndexedEpisode(**{**played, "query": played["unknown"], "draws": played["unknown_draws"]})
    with torch.no_grad():
        for name, of_queries in (("predicted", played), ("unknown_predicted", unknown)):
            logits = direct(head, features, prompts, of_queries, played["numbers"]).logits
            scores[name] = fuse_text(head, share, logits, features[of_queries["query"]], table)
    return scores


def write(path: Path, head: Head, name: str, played: IndexedEpisode, predicted: dict[str, Tensor], **of: Any) -> Path:
    with torch.no_grad():
        bank = EpisodeBank(head, *videos(), played)
    write_bundle(path, bank, facts_of(name, **of), predicted)
    return path


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of 100 episodes, its predictions those of the head."""
    path = tmp_path_factory.mktemp("bundle") / "b.safetensors"
    head, played = make_head(), with_more(episodes(100))
    predicted = {name: scores.argmax(-1) for name, scores in predictions(head, played, 0).items()}
    numbers = read_bundle(write(path, head, "m2df", played, predicted)).replay().numbers
    return write(path, head, "m2df", played, predicted, numbers=numbers | {"loss/total": 1.0, "loss/class": math.nan})


def parts(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What safetensors itself finds in a bundle: what was told, and tensors."""
    with safe_open(path, framework="pt") as file:
        told = json.loads(file.metadata()["facts"])
        return told, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def seal(path: Path, told: object, tensors: dict[str, Tensor], form: str = "clip-m2df bundle 1") -> Path:
    """Write a bundle of whatever content, its digest the right one."""
    content = save(tensors)
    end = 8 + int.from_bytes(content[:8], "little")
    metadata = {"sha256": "0" * 64, "format": form, "facts": told if isinstance(told, str) else json.dumps(told)}
    header = json.dumps({"__metadata__": metadata, **json.loads(content[8:end])}, separators=(",", ":"))
    header += " " * (-len(header) % 8)
    path.write_bytes(sealed(len(header).to_bytes(8, "little") + header.encode() + content[end:]))
    return path


def sealed(whole: bytes) -> bytes:
    """A bundle's bytes with the digest that is right for them."""
    start = whole.index(b'"sha256":"') + len(b'"sha256":"')
    digest = hashlib.sha256(whole[:start] + b"0" * 64 + whole[start + 64 :]).hexdigest()
    return whole[:start] + digest.encode() + whole[start + 64 :]


# Replaying


@pytest.mark.parametrize("n_shot", [1, 5])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_replay_predicts_what_the_head_itself_does(name: str, n_shot: int, tmp_path: Path) -> None:
    head, played = make_head(**OPTIONS[name]), with_more(episodes(100, n_shot=n_shot))
    scores = predictions(head, played, 0.3)
    predicted = {kind: of_queries.argmax(-1) for kind, of_queries in scores.items()}
    options = {"text_fusion": 0.3, **OPTIONS[name]}
    path = write(tmp_path / "b", head, options.pop("head", "m2df"), played, predicted, **options)
    state = torch.random.get_rng_state()
    replayed = read_bundle(path).replay()
    assert torch.random.get_rng_state().equal(state)
    for kind, of_queries in scores.items():
        torch.testing.assert_close(replayed.scores[kind], of_queries, atol=1e-4, rtol=0)
        assert replayed.scores[kind].argmax(-1).equal(predicted[kind])
    numbers, right = replayed.numbers, predicted["predicted"] == played["query_labels"]
    assert 0.2 < numbers["accuracy"] == float(right.double().mean()) < 1
    shares = right.double().mean(-1)
    assert numbers["interval"] == pytest.approx(1.96 * float(shares.std(correction=0)) / 10, rel=1e-9)
    assert numbers["accuracy_twins"] == pytest.approx(float(right[played["twins"]].double().mean()))
    known, unknown = (of_queries.amax(-1).flatten().tolist() for of_queries in scores.values())
    above = [k > u for k, u in itertools.product(known, unknown)]
    assert numbers["auroc/distance"] == pytest.approx(sum(above) / len(above), abs=1e-3)


M2DF: dict[str, Any] = {"head": "m2df", "selection": "sample"}
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "64-true")
PLAYED = [
    *(pytest.param(p, n, M2DF, id=f"{p}-{n}") for p, n in itertools.product(PRECISIONS, (1, 3))),
    pytest.param("bf16-mixed", 2, {"head": "m2df", "selection": "each"}, id="each"),
    *(pytest.param("32-true", 3, {"head": h, "head_options": OWN_OPTIONS.get(h)}, id=h) for h in HEADS if h != "m2df"),
]


@pytest.mark.parametrize(("precision", "n_shot", "options"), PLAYED)
def test_the_bundle_of_a_test_gives_its_numbers_again(
    many: Path,  # noqa: F811
    tiny_clip_dir: Path,
    tmp_path: Path,
    precision: str,
    n_shot: int,
    options: dict[str, Any],
) -> None:
    path, n = tmp_path / "b.safetensors", 300 if options["head"] == "m2df" else 60
    model = make(tiny_clip_dir, text_fusion=0.2, bank_memory=0 if n_shot == 3 else 4, **options)
    trainer = quiet_trainer(tmp_path, precision=precision, callbacks=[BundleWriter(path)])
    source = data(many, test_episodes=n, n_shot=n_shot, unknown_queries=2)
    (found,) = trainer.test(model, source, verbose=False)
    read = read_bundle(path)
    replayed = read.replay()
    for kind in ("predicted", "unknown_predicted"):
        assert replayed.scores[kind].argmax(-1).equal(read.predicted[kind])
    assert replayed.others(read.facts.numbers) == {}
    assert model.evaluated is not None
    # To the last bit.
    assert replayed.numbers == {
        name: float(value) for name, value in model.evaluated.numbers.items() if not name.startswith("loss/")
    }
    assert found["test/accuracy"] == pytest.approx(replayed.numbers["accuracy"])
    assert read.facts.precision == precision
    assert read.features.dtype == (torch.bfloat16 if "bf16" in precision else read.head.scale.dtype)


def test_any_number_of_ranks_writes_the_same_bytes(
    many: Path,  # noqa: F811
    tiny_clip_dir: Path,
    tmp_path: Path,
) -> None:
    for devices in (1, 2):
        how = {"strategy": "ddp_fork", "use_distributed_sampler": False} if devices > 1 else {}
        trainer = quiet_trainer(tmp_path, devices=devices, callbacks=[BundleWriter(tmp_path / f"{devices}")], **how)
        trainer.test(make(tiny_clip_dir), data(many, test_episodes=131, unknown_queries=1), verbose=False)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert len(read_bundle(tmp_path / "1").predicted["predicted"]) == 131


@pytest.mark.slow
def test_a_bundle_is_verified_where_there_is_nothing_else(
    fitted: Path, manifest: Path, tiny_clip_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = tmp_path / "videos"
    shutil.copytree(manifest.parent, gone)
    run = options(gone / manifest.name, tiny_clip_dir, tmp_path / "run", "--data.test_episodes=40")
    best = f"--ckpt_path={fitted / 'checkpoints' / 'best.ckpt'}"
    assert main(["test", *run, best, "--bundle", str(tmp_path / "b.safetensors")]) == 0
    digest = hashlib.sha256((tmp_path / "b.safetensors").read_bytes()).hexdigest()
    assert digest in capsys.readouterr().out
    for folder in ("videos", "run"):
        shutil.rmtree(tmp_path / folder)
    (tmp_path / "elsewhere").mkdir()
    moved = (tmp_path / "b.safetensors").rename(tmp_path / "elsewhere" / "moved")
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "HF_HOME")}
    done = subprocess.run(
        [sys.executable, "-m", "clip_m2df", "verify", "moved"],
        cwd=moved.parent,
        env=environment | {"HOME": str(tmp_path / "elsewhere"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "the same: all 120 queries" in done.stdout
    assert digest in done.stdout


# What came out otherwise


def test_queries_that_differ_are_counted(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(bundle)]) == 0
    assert "the same: all 800 queries" in capsys.readouterr().out
    told, tensors = parts(bundle)
    for row, query in ((3, 0), (3, 5), (97, 2)):
        tensors["predicted"][row, query] = (tensors["predicted"][row, query] + 1) % 3
    tensors["unknown_predicted"][50, 1] = (tensors["unknown_predicted"][50, 1] + 1) % 3
    assert main(["verify", str(seal(tmp_path / "b", told, tensors))]) == 1
    said = capsys.readouterr().out
    assert "not the same: 4 of 800 queries are predicted otherwise" in said
    assert "in the episodes 3, 50, 97;" in said


def test_features_and_weights_that_were_changed_give_other_numbers(bundle: Path, tmp_path: Path) -> None:
    for name in ("features", "head/views.local.encoder.layers.0.feed_forward.0.weight", "prompt_table"):
        told, tensors = parts(bundle)
        tensors[name] = tensors[name].flip(0)
        assert main(["verify", str(seal(tmp_path / "b", told, tensors))]) == 1


@pytest.mark.parametrize(
    "changed", [{"accuracy": 0.99}, {"local_accuracy": 0.5}, {"auroc/energy": 0.1}, {"another": 0.1}, {}]
)
def test_a_number_that_does_not_follow_is_told(
    changed: dict[str, float], bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told, tensors = parts(bundle)
    replayed = read_bundle(bundle).replay().numbers
    own = {name: value for name, value in replayed.items() if changed or name != "interval"}
    path = seal(tmp_path / "b", told | {"numbers": own | changed}, tensors)
    assert main(["verify", str(path)]) == 1
    said = capsys.readouterr().out
    missing: dict[str, float | None] = {"interval": None}
    for name, value in (changed or missing).items():
        assert f"  {name} was {value}, and is {replayed.get(name)}" in said
    assert "0 of 800 queries are predicted otherwise" in said


def test_names_in_a_file_print_no_line_of_their_own(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told, tensors = parts(bundle)
    lines = "x\nthe same: all 800 queries"
    told |= {"numbers": {lines: 1.0}, "device": lines, "versions": {"torch": lines}}
    assert main(["verify", str(seal(tmp_path / "b", told, tensors))]) == 1
    assert not any(line.startswith("the same") for line in capsys.readouterr().out.splitlines())


def test_where_it_was_played_otherwise_that_is_said(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told, tensors = parts(bundle)
    tensors["predicted"] = (tensors["predicted"] + 1) % 3
    path = seal(tmp_path / "b", told | {"device": "cuda", "versions": {"torch": "2.0.0"}}, tensors)
    assert main(["verify", str(path)]) == 1
    assert "played by torch 2.0.0 on cuda, and is replayed by torch " in capsys.readouterr().out


# Damage


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_bundle(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_any_flipped_bit_is_refused(tmp_path: Path) -> None:
    played = episodes(9)
    path = write(tmp_path / "b", make_head("otam"), "otam", played, {"predicted": played["query_labels"]})
    content, draw = path.read_bytes(), random.Random(0)
    end = 8 + int.from_bytes(content[:8], "little")
    # One bit of each byte of the header, all bits of its beginning, and 200 anywhere.
    flips = [(at, draw.randrange(8)) for at in range(end)] + [(at, bit) for at in range(120) for bit in range(8)]
    flips += [(draw.randrange(len(content)), draw.randrange(8)) for _ in range(200)]
    for at, bit in flips:
        damaged = bytearray(content)
        damaged[at] ^= 1 << bit
        path.write_bytes(damaged)
        assert "damaged" in refusal(path)
    path.write_bytes(content)
    read_bundle(path)


def test_a_file_that_is_cut_or_grows_is_refused(bundle: Path, tmp_path: Path) -> None:
    content, path = bundle.read_bytes(), tmp_path / "b"
    end = 8 + int.from_bytes(content[:8], "little")
    for size in (0, 1, 7, 8, 9, 33, 34, 35, 97, 98, 99, end - 1, end, end + 1, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        assert "damaged" in refusal(path)
    for more in (b"\0", b" ", content):
        path.write_bytes(content + more)
        assert "damaged" in refusal(path)


@pytest.mark.parametrize("what", ["missing", "folder", "checkpoint", "other safetensors"])
def test_other_files_are_refused(what: str, fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = fitted / "checkpoints" / "best.ckpt" if what == "checkpoint" else tmp_path / "b"
    if what == "folder":
        path.mkdir()
    elif what == "other safetensors":
        path.write_bytes(save({"features": torch.ones(2)}, {"format": "pt"}))
    assert str(path) in fails(["verify", str(path)], capsys)


Forge = Callable[[dict[str, Any], dict[str, Tensor]], object]
FORGED: dict[str, Forge] = {
    "no features": lambda told, t: t.pop("features"),
    "no predictions": lambda told, t: t.pop("predicted"),
    "no draws of the unknown": lambda told, t: t.pop("episodes/unknown_draws"),
    "no predictions of the unknown": lambda told, t: t.pop("unknown_predicted"),
    "twins as integers": lambda told, t: t.update({"episodes/twins": t["episodes/twins"].long()}),
    "an unknown video that is not there": lambda told, t: t["episodes/unknown"].view(-1)[0].fill_(63),
    "an unknown class that is not there": lambda told, t: t["episodes/unknown_classes"].view(-1)[0].fill_(7),
    "another tensor": lambda told, t: t.update(more=torch.ones(2)),
    "no head": lambda told, t: [t.pop(name) for name in list(t) if name.startswith("head/")],
    "no scale": lambda told, t: t.pop("head/scale"),
    "a weight of another shape": lambda told, t: t.update({"head/scale": torch.ones(3)}),
    "a weight that is not finite": lambda told, t: t.update({"head/scale": torch.full((1,), math.nan)}),
    "a weight of integers": lambda told, t: t.update({"head/scale": torch.ones(1, dtype=torch.long)}),
    "features that are not finite": lambda told, t: t["features"].view(-1)[5:6].fill_(math.inf),
    "features of integers": lambda told, t: t.update(features=t["features"].long()),
    "features of another type": lambda told, t: t.update(features=t["features"].double()),
    "features beyond all": lambda told, t: t["features"].fill_(3e38),
    "features of two axes": lambda told, t: t.update(features=t["features"].flatten(1)),
    "features of another width": lambda told, t: t.update(features=t["features"][..., :-1].contiguous()),
    "no videos": lambda told, t: t.update(features=t["features"][:0].clone()),
    "a video that is not there": lambda told, t: t["episodes/support"].view(-1)[0].fill_(len(t["features"])),
    "a negative video": lambda told, t: t["episodes/query"].view(-1)[0].fill_(-1),
    "a class that is not there": lambda told, t: t["episodes/class_indices"].view(-1)[0].fill_(7),
    "a label that is not there": lambda told, t: t["episodes/query_labels"].view(-1)[0].fill_(3),
    "a prediction that is not there": lambda told, t: t["predicted"].view(-1)[0].fill_(3),
    "predictions as numbers": lambda told, t: t.update(predicted=t["predicted"].double()),
    "draws as integers": lambda told, t: t.update({"episodes/draws": t["episodes/draws"].long()}),
    "draws of another shape": lambda told, t: t.update({"episodes/draws": t["episodes/draws"][:, :-1].contiguous()}),
    "fewer predictions": lambda told, t: t.update(predicted=t["predicted"][:-1].clone()),
    "numbers that do not rise": lambda told, t: t.update({"episodes/numbers": t["episodes/numbers"].flip(0)}),
    "a class more": lambda told, t: told["class_names"].append("more"),
    "no class names": lambda told, t: told.pop("class_names"),
    "names in a text": lambda told, t: told.update(class_names="abcdefg"),
    "names that are numbers": lambda told, t: told.update(class_names=[*range(7)]),
    "another option": lambda told, t: told.update(more=1),
    "no such head": lambda told, t: told.update(head="otm"),
    "a head that is none": lambda told, t: told.update(head="os.path"),
    "a head that is a number": lambda told, t: told.update(head=5),
    "no such option": lambda told, t: told["head_options"].update(widht=5),
    "an option out of range": lambda told, t: told["head_options"].update(smoothing=-1),
    "an option of another type": lambda told, t: told["head_options"].update(smoothing="x"),
    "options that are no table": lambda told, t: told.update(head_options=[1]),
    "another width": lambda told, t: told["head_options"].update(dim=8),
    "a block of nothing": lambda told, t: told.update(block=0),
    "a block of a half": lambda told, t: told.update(block=1.5),
    "no memory": lambda told, t: told.update(memory=-1),
    "a memory that is no number": lambda told, t: told.update(memory=math.nan),
    "a precision that is none": lambda told, t: told.update(precision="8-bit"),
    "text beyond all": lambda told, t: told.update(text_fusion=2),
    "numbers in a list": lambda told, t: told.update(numbers=[1]),
    "a number that is a text": lambda told, t: told.update(numbers={"accuracy": "1"}),
    "a class twice": lambda told, t: t["episodes/class_indices"][5, 1].fill_(int(t["episodes/class_indices"][5, 0])),
    "a query of the support": lambda told, t: t["episodes/query"][5, 0].fill_(int(t["episodes/support"][5, 0, 0])),
    "queries of another class": lambda told, t: t["episodes/query_labels"][5].copy_(
        t["episodes/query_labels"][5].flip(0)
    ),
    "an unknown query of a class": lambda told, t: t["episodes/unknown_classes"][5, 0].fill_(
        int(t["episodes/class_indices"][5, 0])
    ),
    "weights that fill the memory": lambda told, t: told["head_options"].update(hidden_dim=10**13),
    "weights beyond all": lambda told, t: told["head_options"].update(hidden_dim=10**30),
    "prompts maybe": lambda told, t: told.update(prompts=5),
}


@pytest.mark.parametrize("forged", FORGED)
def test_content_that_no_test_has_is_refused_whatever_its_digest(
    forged: str, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told, tensors = parts(bundle)
    read_bundle(seal(tmp_path / "b", told, tensors))
    FORGED[forged](told, tensors)
    path = seal(tmp_path / "b", told, tensors)
    said = fails(["verify", str(path)], capsys)
    assert f"{path} can't be replayed" in said
    assert len(said) < 700 + len(str(path))


@pytest.mark.parametrize("told", ["", "[]", "{", "5", "[" * 100_000])
def test_what_is_told_has_to_be_a_table(told: str, bundle: Path, tmp_path: Path) -> None:
    assert "can't be replayed" in refusal(seal(tmp_path / "b", told, parts(bundle)[1]))


def test_another_version_is_named(bundle: Path, tmp_path: Path) -> None:
    assert "'clip-m2df bundle 2', not 'clip-m2df bundle 1'" in refusal(
        seal(tmp_path / "b", *parts(bundle), form="clip-m2df bundle 2")
    )


def test_other_peoples_code_is_imported_for_nobody_who_has_not_asked_for_it(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "strangers_heads.py").write_text(
        "from clip_m2df.nn.m2df import M2DFHead\n\n\nclass Contrary(M2DFHead):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    told, tensors = parts(bundle)
    head = "strangers_heads.Contrary"
    path = seal(tmp_path / "b", told | {"head": head}, tensors)
    for asked in ([], ["--head", "m2df"], ["--head", "strangers_heads.Other"]):
        said = fails(["verify", str(path), *asked], capsys)
        assert f"takes the head '{head}', code that is not this package's" in said
        assert f"--head {head}" in said
        assert "strangers_heads" not in sys.modules
    assert main(["verify", str(path), "--head", head]) == 0
    assert sys.modules.pop("strangers_heads").Contrary
    # What is imported already has been trusted.
    assert main(["verify", str(seal(path, told | {"head": f"{__name__}.Contrary"}, tensors))]) == 0


# Writing


def test_what_cannot_be_a_bundle_is_refused_before_the_test(
    fitted: Path, manifest: Path, tiny_clip_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = shutil.copy(fitted / "checkpoints" / "best.ckpt", tmp_path)
    content = Path(checkpoint).read_bytes()
    run = ["test", *options(manifest, tiny_clip_dir, tmp_path / "run"), f"--ckpt_path={checkpoint}"]
    assert "is there and is no bundle: name a new file" in fails([*run, f"--bundle={checkpoint}"], capsys)
    assert Path(checkpoint).read_bytes() == content
    assert "it is a folder; name a file" in fails([*run, f"--bundle={tmp_path}"], capsys)
    direct_path = [*run, f"--bundle={tmp_path / 'b'}", "--data.evaluation=direct"]
    assert "give --data.evaluation bank" in fails(direct_path, capsys)
    several = [*run, f"--bundle={tmp_path / 'b'}", f"--also={manifest}"]
    assert "bundle is of one manifest, and --also names another" in fails(several, capsys)
    assert {path.name for path in tmp_path.iterdir()} == {"best.ckpt"}


def test_a_bundle_takes_the_place_of_another(bundle: Path, tmp_path: Path) -> None:
    path, played = Path(shutil.copy(bundle, tmp_path / "b")), episodes(20)
    of: tuple[Any, ...] = (make_head("otam"), "otam", played, {"predicted": played["query_labels"]})
    assert read_bundle(write(path, *of)).facts.head == "otam"
    with pytest.raises(UserError, match="can't be saved as JSON"):
        write(path, *of, smoothing=torch.ones(1))
    assert read_bundle(path).features.shape == (63, 4, DIM)

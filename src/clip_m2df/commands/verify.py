"""``clip-m2df verify``: replay a test from its bundle, and say whether it comes out the same."""

from __future__ import annotations

from clip_m2df.errors import console, printable, say, some


def verify_bundle(file: str, *, head: str | None = None) -> int:
    """Replay a test from its bundle, and say whether each query comes out the same.

    No video, no tower and no network are needed. Numbers that do not follow from the predictions alone, such as an
    AUROC, may differ by a millionth; losses are not compared.

    Args:
        file: What ``clip-m2df test --bundle`` wrote.
        head: The class path of the bundle's head, if it is code that is not this package's and you trust it.

    Returns:
        The exit status: 0, or 1 if a query or a number comes out otherwise.

    Raises:
        UserError: There is no such file, it is damaged or no bundle, or its head is other people's code.
    """
    import torch

    from clip_m2df.evaluation.bundle import read_bundle
    from clip_m2df.evaluation.metrics import OPEN_SET
    from clip_m2df.files import sha256_of
    from clip_m2df.training.callbacks import open_set_table, result_table
    from clip_m2df.weight_files import digest_of

    bundle = read_bundle(file, head)
    replayed = bundle.replay()
    facts, episodes, numbers = bundle.facts, bundle.episodes, replayed.numbers
    _, n_way, n_shot = episodes["support"].shape
    what = f"{facts.head}, {len(episodes['numbers'])} episodes, {n_way}-way {n_shot}-shot"
    console().print(result_table("test", numbers, what))
    if numbers.keys() & {*OPEN_SET}:
        console().print(open_set_table(numbers, f"{episodes['unknown'].shape[1]} unknown queries an episode"))
    parts = {
        "features and prompts": {"features": bundle.features, "prompt_table": bundle.prompt_table},
        "episodes": {name: column for name, column in sorted(episodes.items()) if isinstance(column, torch.Tensor)},
        "head": bundle.head.state_dict(),
    }
    digests = ", ".join(f"{name} {digest_of(tensors)[:16]}" for name, tensors in parts.items())
    say(f"{file} is whole: SHA-256 {sha256_of(file)}; {digests}")
    gaps, others = replayed.gaps(bundle.predicted), replayed.others(facts.numbers)
    differ = ~gaps.isnan()
    if not differ.any() and not others:
        say(f"the same: all {differ.numel()} queries, and all {len(numbers)} numbers")
        return 0
    say(f"not the same: {int(differ.sum())} of {differ.numel()} queries are predicted otherwise")
    if differ.any():
        named = some(map(str, episodes["numbers"][differ.any(-1)].tolist()))
        say(f"  in the episodes {named}; the classes of the test score {float(gaps[differ].max()):.3g} less at most")
    for name, (then, now) in others.items():  # names that a file gives, which may hold line breaks
        say(f"  {printable(name)} was {then}, and is {now}")
    here, there = f"torch {torch.__version__} on cpu", f"torch {facts.versions.get('torch')} on {facts.device}"
    if here != there:
        told = f"it was played by {there}, and is replayed by {here}, which may round the last digits otherwise"
        say(printable(told))
    return 1

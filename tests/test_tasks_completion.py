"""Completion: what is seen and what is asked are points of one surface, and the distances are those of the definition."""

import pytest
import torch

from regard.skeletons.sequence import MixerReader
from regard.tasks import create_task
from regard.tasks.measures import measure


def test_half_is_seen():
    task = create_task("completion", points=64)
    for index in range(8):
        item = task.train_set[index]
        assert item["partial"].shape == (32, 3)
        assert item["whole"].shape == (64, 3)
        assert item["whole"].norm(dim=1).max() <= 1 + 1e-6
        apart = torch.cdist(item["partial"], item["whole"])
        assert apart.min() > 0, "they are different points"
        # From one side: the seen half is away from the middle of the whole, on most surfaces by far.
        assert (item["partial"].mean(0) - item["whole"].mean(0)).norm() > 0.05
    assert torch.equal(task.train_set[3]["whole"], create_task("completion", points=64).train_set[3]["whole"])


def test_distances_by_hand():
    task = create_task("completion", points=4, near=0.5, eval_items=1)
    truth = task.eval_set[0]["whole"]
    said = truth + torch.tensor([0.3, 0.0, 0.0])
    apart = (said[:, None] - truth[None]).norm(dim=-1)
    first, second = apart.min(1).values, apart.min(0).values
    found = measure(task, lambda partial: said[None])
    assert found["chamfer_l1"] == pytest.approx(((first.mean() + second.mean()) / 2).item())
    assert found["chamfer_l2"] == pytest.approx((first.square().mean() + second.square().mean()).item())
    assert found["f_score"] == 1
    assert measure(task, lambda partial: truth[None] + 9)["f_score"] == 0
    batch = {name: value[None] for name, value in task.eval_set[0].items()}
    assert task.loss(lambda partial: said[None], batch).item() == pytest.approx(found["chamfer_l1"])
    trivial = create_task("completion").trivial()
    assert 0 < trivial["chamfer_l1"] < 1
    assert 0.2 < trivial["f_score"] < 0.9


def test_models_and_errors():
    task = create_task("completion", points=16)
    batch = {name: torch.stack([task.train_set[i][name] for i in range(2)]) for name in ("partial", "whole")}
    model = MixerReader("linear", 3, 16, 3, position=False, dim=16, depth=1)
    order = torch.randperm(8)
    torch.testing.assert_close(model(batch["partial"]), model(batch["partial"][:, order]))
    task.loss(model, batch).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with pytest.raises(ValueError, match="must return clouds"):
        task.loss(lambda partial: partial, batch)
    for options, message in (({"points": 7}, "must be even"), ({"near": 0}, "near must be above 0")):
        with pytest.raises(ValueError, match=message):
            create_task("completion", **options)

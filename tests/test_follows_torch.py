"""Twenty updates of the training step beside PyTorch: same weights, same batches, same losses.

The PyTorch side is written the original's way: its parameter groups, torch's AdamW and clipping,
a learning rate that is set after each update.
"""

import math
import re

import numpy as np
import pytest

from tinyvit_jax import config as configs
from tinyvit_jax import mesh as meshes
from tinyvit_jax import models, optim, train

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

UPDATES, WARMUP, CLASSES = 20, 4, 5
DEPTHS = (1, 1, 2, 1)


def make_config():
    c = configs.default()
    c.model.update({"name": "tiny_vit", "image_size": 32, "embed_dims": (8, 16, 16, 24),
                    "depths": DEPTHS, "num_heads": (1, 2, 2, 3), "window_sizes": (4, 4, 4, 2)})
    c.optim.update({"learning_rate": 4e-3, "warmup_learning_rate": 1e-4, "weight_decay": 0.05,
                    "min_learning_rate": 1e-4, "scale_by_batch": False, "clip_norm": 5.0,
                    "layer_decay": 0.8})
    return c


def make_batches():
    generator = np.random.default_rng(1)
    return [{"image": generator.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8),
             "label": generator.integers(0, CLASSES, 8).astype(np.int32),
             "weight": np.ones(8, np.float32)} for _ in range(UPDATES)]


def our_losses(config, model, variables, batches):
    """The losses and gradient norms of `make_train_step`."""
    mesh = meshes.make_mesh()
    schedule = optim.make_schedule(config.optim, 8, UPDATES, WARMUP / config.optim.warmup_epochs)
    params, zero = variables["params"], np.zeros((), np.int32)
    opt_state = optim.make_optimizer(config.optim).init(optim.pack_by_decay(params).pack(params))
    state = meshes.put_state(train.State(zero, params, variables["batch_stats"], opt_state, {},
                                         zero), mesh)
    step = train.make_train_step(config, model, schedule, mesh)
    rows = []
    for batch in batches:
        state, metrics = step(state, meshes.put_batch(batch, mesh))
        rows.append((float(metrics["loss"]), float(metrics["gradient_norm"])))
    return np.array(rows).T


def factor(name, decay):
    """The original's factor of a parameter's learning rate."""
    ends = np.cumsum((0, *DEPTHS))
    found = re.match(r"layers\.(\d)\.(?:blocks\.(\d)|downsample)", name)
    if name.startswith("patch_embed"):
        return decay ** (ends[-1] - 1)
    if not found:
        return 1.0
    stage = int(found[1])
    block = ends[stage + 1] - 1 if found[2] is None else ends[stage] + int(found[2])
    return decay ** (ends[-1] - 1 - block)


def make_adamw(module, o):
    """One group for each (factor, decayed or not), as the original divides them."""
    groups: dict = {}
    for name, p in module.named_parameters():
        spared = p.ndim == 1 or name.endswith(".bias") or "attention_biases" in name
        key = factor(name, o.layer_decay), 0.0 if spared else o.weight_decay
        groups.setdefault(key, []).append(p)
    # Its scheduler starts every group at the plain warmup rate: the factors come after update 0.
    return torch.optim.AdamW([{"params": ps, "weight_decay": wd, "factor": f,
                               "lr": o.warmup_learning_rate} for (f, wd), ps in groups.items()],
                             betas=tuple(o.betas), eps=o.eps)


def rate(o, t):
    if t < WARMUP:
        return o.warmup_learning_rate + t * (o.learning_rate - o.warmup_learning_rate) / WARMUP
    span = o.learning_rate - o.min_learning_rate
    return o.min_learning_rate + 0.5 * span * (1 + math.cos(math.pi * t / UPDATES))


def torch_losses(config, module, batches, frozen):
    o, rows = config.optim, []
    adamw = make_adamw(module, o)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.data.mean, config.data.std))
    for update, batch in enumerate(batches):
        module.eval() if frozen else module.train()
        images = torch.tensor(batch["image"]).permute(0, 3, 1, 2) / 255
        logp = module((images - mean) / std).log_softmax(-1)
        smoothing = config.objective.smoothing
        nll = -logp.gather(1, torch.tensor(batch["label"]).long()[:, None])[:, 0]
        loss = ((1 - smoothing) * nll - smoothing * logp.mean(-1)).mean()
        adamw.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), o.clip_norm)
        adamw.step()
        for group in adamw.param_groups:
            group["lr"] = rate(o, update) * group["factor"]
        rows.append((loss.item(), float(norm)))
    return np.array(rows).T


@pytest.mark.parametrize("frozen", [False, True], ids=["batch statistics", "frozen BatchNorm"])
def test_losses_follow(frozen):
    import torch_tinyvit

    c = make_config()
    model = models.create_model("tiny_vit", CLASSES, 32, embed_dims=c.model.embed_dims,
                                depths=DEPTHS, num_heads=c.model.num_heads,
                                window_sizes=c.model.window_sizes, freeze_norm=frozen)
    module = torch_tinyvit.randomize(torch_tinyvit.TorchTinyViT(model))
    variables = torch_tinyvit.variables_of(module)
    batches = make_batches()
    losses, norms = our_losses(c, model, variables, batches)
    expected, expected_norms = torch_losses(c, module, batches, frozen)
    assert (expected_norms > 5.0).any()  # clipping has a part in it
    np.testing.assert_allclose(losses, expected, atol=1e-4, rtol=0)
    np.testing.assert_allclose(norms, expected_norms, rtol=1e-3)

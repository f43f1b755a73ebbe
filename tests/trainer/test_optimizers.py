from __future__ import annotations

import torch

from modelops.trainer.optimizers import MuonAdamW, make_optimizer, orthogonalise


def test_an_orthogonalised_matrix_keeps_its_spaces_and_has_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((16, 48), (48, 16)):
        matrix = torch.randn(shape)
        result = orthogonalise(matrix).float()
        values = torch.linalg.svdvals(result)
        assert values.min() > 0.5 and values.max() < 1.3
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
        cosine = (result * (u @ vh)).sum() / result.norm() / (u @ vh).norm()
        assert cosine > 0.97


def test_what_is_not_a_hidden_weight_is_updated_as_adamw_does_it() -> None:
    torch.manual_seed(0)
    start = torch.randn(5)
    gradients = [torch.randn(5) for _ in range(4)]
    options = {"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.1}
    results = []
    for muon in (True, False):
        weight = torch.nn.Parameter(start.clone())
        hidden = torch.nn.Parameter(torch.zeros(2, 3, 3, 3))
        groups = [{"params": [weight]}]
        optimizer = (
            MuonAdamW([hidden], groups, **options) if muon else torch.optim.AdamW(groups, **options)
        )
        for gradient in gradients:
            weight.grad = gradient.clone()
            hidden.grad = torch.ones_like(hidden)
            optimizer.step()
            optimizer.zero_grad()
        results.append(weight.detach())
    assert torch.equal(*results)


def test_muon_takes_every_hidden_matrix_and_kernel_and_no_edge() -> None:
    from modelops.models.networks import make_unet
    from modelops.training.config import TrainingSection

    network = make_unet(
        resolution=16, patch_size=2, channels=32, multipliers=(1,), attention_levels=()
    )
    optimizer = make_optimizer(network, TrainingSection(optimizer="muon"))
    hidden, edges, vectors = (group["params"] for group in optimizer.param_groups)
    assert all(weight.ndim >= 2 for weight in hidden)
    assert {id(w) for w in edges} == {id(network.conv_in.weight), id(network.conv_out.weight)}
    assert all(weight.ndim == 1 for weight in vectors)
    total = sum(1 for _ in network.parameters())
    assert len(hidden) + len(edges) + len(vectors) == total

import decimal
import functools
import math

import numpy as np
import pytest
import torch

from wsolnb.backbones import create_backbone
from wsolnb.errors import ParameterError
from wsolnb.methods import scm, stencil
from wsolnb.methods.scm import SCM, ActivationDiffusionBlock, SCMConfig, SpatialCalibration
from wsolnb.methods.tscam import TSCAM

GRIDS = [(14, 14), (6, 7), (28, 28)]


@functools.cache
def reference_adjacency(rows, columns):
    size = rows * columns
    adjacency = torch.zeros(size, size, dtype=torch.float64)
    for i in range(size):
        for j in range(size):
            apart = abs(i // columns - j // columns) + abs(i % columns - j % columns)
            adjacency[i, j] = float(apart == 1)
    return adjacency


def reference_laplacian(tokens, lam):
    """Eq. 3 and 4 as matrices: (B, Q, h, w) -> (B, N, N)."""
    adjacency = reference_adjacency(*tokens.shape[2:])
    degree = torch.diag(adjacency.sum(dim=1))
    vectors = tokens.flatten(2).transpose(1, 2)
    lengths = (vectors * vectors).sum(dim=2).sqrt()
    similarity = vectors @ vectors.transpose(1, 2) / (lengths[:, :, None] * lengths[:, None])
    return (degree - adjacency) * (lam * similarity - 1)


def reference_diffusion(attention, tokens, lam, steps, alpha, constant_start):
    matrix = reference_laplacian(tokens, lam)
    x = alpha * matrix.transpose(1, 2)
    if constant_start:
        x = x.detach()
    identity = torch.eye(matrix.shape[1], dtype=torch.float64)
    for _ in range(steps):
        x = x @ (2 * identity - matrix @ x)
    return (x @ attention.flatten(1).unsqueeze(2)).squeeze(2).reshape(attention.shape)


BERNOULLI = [1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6, -3617 / 510]


def reference_shrink(x):
    """x - tanh(x); near 0, where even float64 cancels, the Taylor series of tanh by its Bernoulli numbers."""
    series = torch.zeros_like(x)
    for n, b in list(enumerate(BERNOULLI))[1:]:
        four = 4 ** (n + 1)
        series = series - four * (four - 1) * b / math.factorial(2 * n + 2) * x ** (2 * n + 1)
    return torch.where(x.abs() < 0.15, series, x - torch.tanh(x))


def reference_block(attention, tokens, lam, beta, steps, config):
    moved = reference_diffusion(attention, tokens, lam, steps, config.alpha, config.constant_start)
    out = []
    for i in range(len(attention)):
        if config.filter == "absolute":
            ratio = moved[i] / beta
            kept = beta * reference_shrink(ratio)
        else:
            ratio = moved[i] / (beta * attention[i].max())
            kept = reference_shrink(ratio)
            kept = (kept - kept.min()) / (kept.max() - kept.min())
        out.append(kept)
    kept = torch.stack(out)
    if config.residual:
        return attention + kept, tokens + tokens * kept.unsqueeze(1)
    return kept, tokens * kept.unsqueeze(1)


def maps(grid, seed, batch=2, channels=5):
    generator = torch.Generator().manual_seed(seed)
    attention = torch.rand(batch, *grid, generator=generator, dtype=torch.float64)
    tokens = torch.randn(batch, channels, *grid, generator=generator, dtype=torch.float64)
    return attention.requires_grad_(), tokens.requires_grad_()


def relative(found, expected):
    return float(((found - expected).abs().max() / expected.abs().max()).detach())


@pytest.mark.parametrize("steps", [0, 1, 4, 9])
@pytest.mark.parametrize("lam", [0.5, 1.0, 1.5])
def test_the_equations_as_written_equal_loops_and_the_stencil(lam, steps):
    tokens, attention = torch.randn(2, 5, 6, 7, dtype=torch.float64), torch.rand(2, 6, 7, dtype=torch.float64)
    torch.testing.assert_close(scm.plain_laplacian(tokens, lam), reference_laplacian(tokens, lam), atol=1e-12, rtol=0)
    torch.testing.assert_close(scm.plain_laplacian(tokens, lam), scm.laplacian(tokens, lam).dense(), atol=1e-12, rtol=0)
    plain = scm.plain_diffuse(attention, tokens, lam, steps)
    expected = reference_diffusion(attention, tokens, lam, steps, 0.002, False)
    torch.testing.assert_close(plain, expected, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(plain, scm.diffuse(attention, tokens, lam, steps), atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("constant_start", [False, True])
def test_diffusion_and_its_gradients_equal_the_dense_form(grid, constant_start):
    for steps in range(9):
        attention, tokens = maps(grid, steps, batch=1 if grid == (28, 28) else 2)
        lam = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
        direction = torch.randn(attention.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        values, gradients = [], []
        for function in (scm.diffuse, reference_diffusion):
            value = function(attention, tokens, lam, steps, 0.002, constant_start)
            values.append(value.detach())
            leaves = (attention, tokens, lam)
            found = torch.autograd.grad((value * direction).sum(), leaves, allow_unused=True)
            # Held constant, X_0 alone (no step) does not depend on the tokens.
            gradients.append([torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)])
        assert relative(*values) <= 1e-9
        for found, expected in zip(*gradients, strict=True):
            if expected.abs().max() == 0:
                assert found.abs().max() < 1e-12
            else:
                assert relative(found, expected) <= 1e-9, steps


@pytest.mark.parametrize("preset", ["paper", "released"])
@pytest.mark.parametrize("grid", GRIDS)
def test_one_block_and_its_gradients_equal_the_dense_form(preset, grid):
    # With the paper's weak alpha and small attention nothing would pass its filter.
    config = getattr(SCMConfig, preset)(lam=1.2, beta=0.4, **({"alpha": 0.02} if preset == "paper" else {}))
    for first in (False, True):
        attention, tokens = maps(grid, 5, batch=1 if grid == (28, 28) else 2)
        with torch.no_grad():
            attention *= 4 if preset == "paper" else 1
        block = ActivationDiffusionBlock(config, first).double()
        lam, beta = (p.detach().clone().requires_grad_() for p in (block.lam, block.beta))
        steps = config.first_steps if first else config.steps
        directions = [maps(grid, 6, len(attention))[i].detach() for i in (0, 1)]
        sides = (
            (block(attention, tokens), (attention, tokens, block.lam, block.beta)),
            (reference_block(attention, tokens, lam, beta, steps, config), (attention, tokens, lam, beta)),
        )
        gradients = []
        for maps_out, leaves in sides:
            loss = sum((m * d).sum() for m, d in zip(maps_out, directions, strict=True))
            gradients.append(torch.autograd.grad(loss, leaves))
        for found, expected in zip(sides[0][0], sides[1][0], strict=True):
            assert relative(found, expected) <= 1e-9
        for name, found, expected in zip(("F", "S", "lambda", "beta"), *gradients, strict=True):
            assert relative(found, expected) <= 1e-9, name


@pytest.mark.parametrize("preset", ["paper", "released"])
@pytest.mark.parametrize("grid", [(14, 14), (6, 7)])
def test_blocks_and_their_gradients_equal_the_dense_form(preset, grid):
    # The paper's filter cubes what is small: without large attention nothing is left to compare behind four blocks.
    config = getattr(SCMConfig, preset)(lam=1.2, beta=0.4, **({"alpha": 0.02} if preset == "paper" else {}))
    attention, tokens = maps(grid, 3)
    module = SpatialCalibration(config).double()
    flat = (attention * (40 if preset == "paper" else 1)).flatten(1)[:, None, None]
    found = module(flat, tokens)
    first = flat[:, 0, 0].reshape(attention.shape)
    if config.attention == "min_max":
        first = torch.stack([(x - x.min()) / (x.max() - x.min()) for x in first])
    lams = [block.lam.detach().clone().requires_grad_() for block in module.blocks]
    betas = [block.beta.detach().clone().requires_grad_() for block in module.blocks]
    expected = [(first, tokens)]
    for i in range(4):
        steps = config.first_steps if i == 0 else config.steps
        expected.append(reference_block(*expected[-1], lams[i], betas[i], steps, config))
    for (f, s), (f_expected, s_expected) in zip(found, expected, strict=True):
        assert relative(f, f_expected) <= 1e-9
        assert relative(s, s_expected) <= 1e-9
    ours = [p for block in module.blocks for p in (block.lam, block.beta)]
    theirs = [p for pair in zip(lams, betas, strict=True) for p in pair]
    losses = [last.mean(dim=(2, 3)).square().sum() for last in (found[-1].semantic, expected[-1][1])]
    gradients = torch.autograd.grad(losses[0], [attention, tokens, *ours], retain_graph=True)
    references = torch.autograd.grad(losses[1], [attention, tokens, *theirs])
    for gradient, reference in zip(gradients, references, strict=True):
        # Through blocks in series, and a filter that cubes, the rounding of both sides grows.
        assert relative(gradient, reference) <= 1e-7


def test_gradcheck():
    attention, tokens = maps((3, 4), 0, channels=2)
    lam = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    for steps in (0, 1, 3):
        assert torch.autograd.gradcheck(
            lambda a, t, x, p=steps: scm.diffuse(a, t, x, p, 0.01), (attention, tokens, lam)
        )
    x = torch.linspace(-1.5, 1.5, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(scm.tanh_shrink, x)


@pytest.mark.parametrize(("kind", "room"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_tanh_shrink_keeps_its_digits_where_the_difference_cancels(kind, room):
    for value in (1e-3, 0.02, 0.0799, 0.0801, 0.1499, 0.1501, 0.5, -0.05, 3.0):
        x = torch.tensor(value, dtype=kind, requires_grad=True)
        found = scm.tanh_shrink(x)
        found.backward()
        with decimal.localcontext(prec=40):
            exact = decimal.Decimal(float(x.detach()))
            tanh = 1 - 2 / ((2 * exact).exp() + 1)
            expected, slope = float(exact - tanh), float(tanh**2)
        assert float(found.detach()) == pytest.approx(expected, rel=room)
        assert float(x.grad) == pytest.approx(slope, rel=room)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_tanh_shrink_of_large_values_has_a_derivative(kind):
    x = torch.tensor([1.0, 30.0, 190.0, 1e3, 1e6, 1e12, -1e6], dtype=kind, requires_grad=True)
    found = scm.tanh_shrink(x)
    found.sum().backward()
    torch.testing.assert_close(found, x - x.tanh())
    torch.testing.assert_close(x.grad, x.detach().tanh() ** 2)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("likeness", [1.0, 0.01])
def test_the_relative_filter_does_not_know_the_magnitude_of_the_attention(kind, steps, likeness):
    # Powers of two change no digit, so that only a floor in the code could make a difference.
    generator = torch.Generator().manual_seed(0)
    place = torch.linspace(-2, 2, 14)
    attention = torch.exp(-(place[:, None] ** 2) - place**2)[None].to(kind)
    tokens = torch.randn(1, 5, 1, 1, generator=generator) + likeness * torch.randn(1, 5, 14, 14, generator=generator)
    block = ActivationDiffusionBlock(SCMConfig.released(), False)
    block.steps = steps
    expected = block.filter(block.diffuse(attention, tokens), attention)
    assert expected.amin() == 0
    assert expected.amax() == 1
    for power in (-40, -20, -3, 3, 20, 40):
        scaled = attention * 2.0**power
        torch.testing.assert_close(block.filter(block.diffuse(scaled, tokens), scaled), expected, atol=1e-5, rtol=0)
        start = SpatialCalibration(SCMConfig.released()).start(scaled.flatten(1)[:, None, None], (14, 14))
        torch.testing.assert_close(start, scm.min_max(attention.float()), atol=1e-6, rtol=0)


@pytest.mark.parametrize("constant_start", [False, True])
@pytest.mark.parametrize("steps", [9, 12, 16])
@pytest.mark.parametrize(("lam", "spread"), [(1.0, 1.0), (1.0, 0.05), (0.7, 0.3)])
def test_many_steps_by_chebyshev_terms_or_by_squares_equal_the_iteration(lam, spread, steps, constant_start):
    attention, tokens = maps((6, 7), 4)
    with torch.no_grad():
        tokens.mul_(spread).add_(1)
    directions = torch.randn(attention.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    lam = torch.tensor(lam, dtype=torch.float64, requires_grad=True)

    def by(function):
        dense = stencil.laplacian(tokens, lam).dense()
        return function(dense, attention.flatten(1)[..., None], steps, 0.002, constant_start).view_as(attention)

    forms = (
        reference_diffusion(attention, tokens, lam, steps, 0.002, constant_start),
        scm.diffuse(attention, tokens, lam, steps, 0.002, constant_start),
        by(stencil._squares),
    )
    leaves = (attention, tokens, lam)
    expected, *found = [(value, *torch.autograd.grad((value * directions).sum(), leaves)) for value in forms]
    for form in found:
        for one, other in zip(form, expected, strict=True):
            assert relative(one, other) <= 1e-6


def test_many_steps_where_the_bound_of_the_eigenvalues_is_too_large_take_squares():
    attention, tokens = maps((6, 7), 4)
    matrix = stencil.laplacian(tokens, 1.0)
    largest = torch.linalg.eigvalsh(matrix.dense()).abs().max()
    radius = matrix.dense().abs().sum(dim=2).max()
    assert largest < 0.97 * radius
    for bound, squares in ((1.9, False), (2.1, True)):
        alpha = float(bound / radius.detach() ** 2)
        assert (stencil.chebyshev(matrix, 9, alpha) is None) == squares
        expected = reference_diffusion(attention, tokens, 1.0, 9, alpha, False)
        assert relative(scm.diffuse(attention, tokens, 1.0, 9, alpha), expected) <= 1e-9


@pytest.mark.parametrize("spread", [1.0, 0.1])
def test_the_first_block_is_as_good_in_float32_as_the_plain_iteration(spread):
    generator = torch.Generator().manual_seed(3)
    attention = torch.rand(4, 14, 14, generator=generator, dtype=torch.float64)
    tokens = torch.randn(4, 12, 1, 1, generator=generator, dtype=torch.float64)
    tokens = tokens + spread * torch.randn(4, 12, 14, 14, generator=generator, dtype=torch.float64)
    leaves = (attention, tokens, torch.tensor(1.0, dtype=torch.float64))
    outputs = []
    for kind in (torch.float64, torch.float32):
        moved = [x.to(kind).requires_grad_() for x in leaves]
        value = scm.diffuse(*moved, 16, constant_start=True)
        assert value.dtype == kind
        outputs.append([value, *torch.autograd.grad(value.square().sum(), moved)])
    for name, exact, single in zip(("X_p F", "F", "S", "lambda"), *outputs, strict=True):
        assert relative(single.double(), exact) <= 1e-5, name


def test_the_map_of_scm_couples_the_attention_that_its_first_block_gets():
    torch.manual_seed(0)
    output = None
    for preset in ("paper", "released"):
        model = SCM(create_backbone("vit_mini"), 5, config=getattr(SCMConfig, preset)()).eval()
        with torch.no_grad():
            output = output or model(torch.randn(2, 3, 112, 112))
        found = model.localize(output, torch.tensor([0, 3]))
        mean = output.attention.mean(dim=(1, 2)).view(2, 14, 14)
        if preset == "released":
            mean = torch.stack([(m - m.min()) / (m.max() - m.min()) for m in mean])
        semantic = torch.stack([output.semantic_map[0, 0], output.semantic_map[1, 3]])
        torch.testing.assert_close(found["tscam"], mean * semantic)
        torch.testing.assert_close(found["attention"], mean)
        torch.testing.assert_close(found["semantic"], semantic)


def test_a_laplacian_by_hand():
    # A row of three patches: the first two alike, the third opposite to them.
    tokens = torch.tensor([[[[2.0, 1.0, -3.0]]]])
    matrix = scm.laplacian(tokens, lam=0.5).dense()[0]
    expected = [[-0.5, 0.5, 0.0], [0.5, -1.0, 1.5], [0.0, 1.5, -0.5]]
    torch.testing.assert_close(matrix, torch.tensor(expected))


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_no_input_gives_nan(preset):
    rng = np.random.default_rng(0)
    module = SpatialCalibration(getattr(SCMConfig, preset)(first_steps=4))
    # 1,000 inputs of any peakedness and magnitude; of every batch of ten some maps are zero, constant or one-coloured.
    for _ in range(100):
        attention = torch.from_numpy(rng.random((10, 2, 2, 12), dtype=np.float32)) ** int(rng.integers(1, 30))
        semantic = torch.from_numpy(rng.normal(0, 10 ** rng.uniform(-6, 2), (10, 3, 3, 4)).astype(np.float32))
        attention[0], attention[1] = 0.0, float(rng.random())
        semantic[2], semantic[3], semantic[4, :, 0, 0] = 0.0, 1.0, 0.0
        attention[5], semantic[5] = 0.0, 0.0
        semantic.requires_grad_()
        last = module(attention, semantic)[-1]
        last.semantic.sum().backward()
        assert last.attention.isfinite().all()
        assert last.semantic.isfinite().all()
        assert semantic.grad.isfinite().all()
        assert all(p.grad.isfinite().all() for p in module.parameters())


def test_zero_and_constant_attention():
    tokens = torch.randn(1, 4, 5, 5)
    for preset in ("paper", "released"):
        block = ActivationDiffusionBlock(getattr(SCMConfig, preset)())
        zero = block(torch.zeros(1, 5, 5), tokens)
        assert zero.attention.abs().max() == 0
        assert torch.equal(zero.semantic, tokens)
        alone = ActivationDiffusionBlock(getattr(SCMConfig, preset)(residual=False))(torch.zeros(1, 5, 5), tokens)
        assert torch.equal(alone.semantic, torch.zeros_like(tokens))
    assert scm.min_max(torch.full((1, 5, 5), 0.3)).abs().max() == 0


def test_presets_differ_where_paper_and_code_do():
    paper, released = SCMConfig.paper(), SCMConfig.released()
    assert {f for f in SCMConfig.model_fields if getattr(paper, f) != getattr(released, f)} == {
        "first_steps", "attention", "filter", "constant_start",
    }  # fmt: skip
    assert paper.residual  # fig. 2's caption
    assert SCMConfig.released(residual=False).residual is False


def test_the_module_is_there_in_training_only():
    torch.manual_seed(0)
    model = SCM(create_backbone("vit_mini"), 5, config={"blocks": 2, "residual": True, "attention": "min_max"})
    plain = TSCAM(create_backbone("vit_mini"), 5)
    state = model.state_dict()
    plain.load_state_dict({name: value for name, value in state.items() if not name.startswith("calibration")})
    images = torch.randn(2, 3, 112, 112)
    with torch.no_grad():
        outputs = [m.eval()(images) for m in (model, plain)]
        assert torch.equal(outputs[0].logits, outputs[1].logits)
        trained = model.train()(images)
        assert not torch.allclose(trained.logits, trained.semantic_map.mean(dim=(2, 3)))
        last = model.calibration(trained.attention, trained.semantic_map)[-1]
        torch.testing.assert_close(trained.logits, last.semantic.mean(dim=(2, 3)))
    head = {id(p) for p in model.head.parameters()}
    assert all(id(p) in head for block in model.calibration.blocks for p in (block.lam, block.beta))


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ParameterError, match=r"\(1, 3, 4\) and tokens \(1, 2, 4, 3\)"):
        scm.diffuse(torch.rand(1, 3, 4), torch.rand(1, 2, 4, 3), 1.0, 4)
    with pytest.raises(ParameterError, match="-1 Newton-Schulz steps"):
        scm.diffuse(torch.rand(1, 3, 4), torch.rand(1, 2, 3, 4), 1.0, -1)

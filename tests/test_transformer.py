import pytest
import torch

from common import flow
from common.errors import UserError
from common.instructions import Instructions
from common.transformer import (
    ActionDecoder,
    Attention,
    DecoderBlock,
    Encoder,
    InfoEmbedder,
    Observation,
    Size,
    StackedLinear,
    TimeEmbedding,
    sincos_position_2d,
    take_expert,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def randomized(module):
    """Zero-initialized projections hide mistakes: give every parameter a value."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.2)
    return module.double().eval()


def observed(*memory):
    """An observation with this memory, or with a memory of this shape."""
    memory = memory[0] if torch.is_tensor(memory[0]) else torch.randn(*memory, dtype=torch.float64)
    return Observation(memory, memory[:, 0])


def decoder(causal):
    return randomized(ActionDecoder((6, 3), Size(16, 4), num_layers=2, causal=causal))


def test_attention_is_the_softmax_average_of_the_values():
    attention = randomized(Attention(8, 2))
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    q = attention.query(x)
    k, v = attention.key_value(x).chunk(2, -1)
    parts = []
    for h in (slice(0, 4), slice(4, 8)):
        weights = (q[..., h] @ k[..., h].transpose(1, 2) / 2).softmax(-1)  # sqrt(4) = 2
        parts.append(weights @ v[..., h])
    torch.testing.assert_close(attention(x), attention.out(torch.cat(parts, -1)))


def test_heads_must_divide_the_width():
    with pytest.raises(UserError, match="multiple"):
        Attention(10, 4)


def test_masked_keys_cannot_be_seen():
    encoder = randomized(Encoder(Size(16, 4), 2))
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[:, 5:] = False
    changed = torch.where(mask[..., None], x, 100.0)
    torch.testing.assert_close(encoder(x, mask)[:, :5], encoder(changed, mask)[:, :5])
    assert not torch.allclose(encoder(x)[:, :5], encoder(changed)[:, :5])


@pytest.mark.parametrize("causal", [True, False])
def test_padded_actions_change_nothing(causal):
    model = decoder(causal)
    context = model.context(observed(2, 4, 16))
    x, t = torch.randn(2, 6, 3, dtype=torch.float64), torch.rand(2, dtype=torch.float64)
    is_pad = torch.arange(6).expand(2, 6) >= torch.tensor([[4], [2]])
    noisy = torch.where(is_pad[..., None], 50.0, x)
    real = ~is_pad
    torch.testing.assert_close(model(x, t, context, is_pad)[real], model(noisy, t, context, is_pad)[real])


def test_causal_actions_do_not_see_the_future():
    model, full = decoder(True), decoder(False)
    memory = torch.randn(1, 4, 16, dtype=torch.float64)
    x, t = torch.randn(1, 6, 3, dtype=torch.float64), torch.rand(1, dtype=torch.float64)
    changed = x.clone()
    changed[:, 4:] += 1
    torch.testing.assert_close(
        model(x, t, model.context(observed(memory)))[:, :4],
        model(changed, t, model.context(observed(memory)))[:, :4],
    )
    assert not torch.allclose(
        full(x, t, full.context(observed(memory)))[:, :4],
        full(changed, t, full.context(observed(memory)))[:, :4],
    )


def test_draws_of_one_observation_equal_separate_passes():
    """M draws per observation share keys and values; the result equals that of repeating the observation."""
    model = decoder(True)
    memory = torch.randn(2, 4, 16, dtype=torch.float64)
    x, t = torch.randn(6, 6, 3, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    together = model(x, t, model.context(observed(memory)))
    for draw in range(6):
        alone = model(
            x[draw : draw + 1], t[draw : draw + 1], model.context(observed(memory[draw // 3 : draw // 3 + 1]))
        )
        torch.testing.assert_close(together[draw : draw + 1], alone)


def test_an_untrained_decoder_predicts_no_velocity():
    model = ActionDecoder((6, 3), Size(16, 4), 2)
    out = model(
        torch.randn(2, 6, 3),
        torch.rand(2),
        model.context(Observation(torch.randn(2, 4, 16), torch.randn(2, 16))),
    )
    assert (out == 0).all()


def test_time_changes_the_velocity_and_is_resolved_finely():
    model = decoder(True)
    context = model.context(observed(1, 4, 16))
    x = torch.randn(1, 6, 3, dtype=torch.float64)
    near, far = (model(x, torch.tensor([t], dtype=torch.float64), context) for t in (0.50, 0.52))
    assert not torch.allclose(near, far, rtol=1e-3)


def test_time_embedding_is_sinusoids_through_an_mlp():
    embedding = TimeEmbedding(8)
    t = torch.tensor([0.0, 0.37])
    angles = t[:, None] * 1000 ** torch.tensor([0, 1 / 3, 2 / 3, 1])
    expected = embedding.mlp(torch.cat([angles.sin(), angles.cos()], -1))
    torch.testing.assert_close(embedding(t), expected, rtol=1e-4, atol=1e-5)


def test_grid_positions_are_distinct_and_row_major():
    positions = sincos_position_2d(3, 5, 18)
    assert positions.shape == (15, 18)
    assert torch.unique(positions, dim=0).shape[0] == 15
    assert (positions[:, 16:] == 0).all()
    quarter = 4
    y_part = positions[:, :quarter].reshape(3, 5, quarter)
    assert torch.equal(y_part, y_part[:, :1].expand_as(y_part))  # sin(y) is constant along a row


def embedder(droppable=False, tasks=None):
    return InfoEmbedder([(6, 5), (6, 5)], (2, 3), Size(16, 4), 1, droppable, tasks).double()


def test_the_memory_holds_states_and_every_camera():
    views = [(torch.randn(3, 7, 6).double(), torch.randn(3, 5).double()) for _ in range(2)]
    proprio = torch.randn(3, 2, 3).double()
    model = randomized(embedder())
    observation = model(views, proprio)
    assert observation.memory.shape == (3, 2 + 2 * (7 + 1), 16)
    assert observation.summary.shape == (3, 16)
    for swapped, plain in zip(model(views[::-1], proprio), observation, strict=True):
        assert not torch.allclose(swapped, plain)  # cameras are distinguished


def test_an_instruction_scales_what_the_cameras_say():
    model = embedder(tasks=Instructions(("left", "right")))
    views = [[(torch.randn(2, 7, 6).double(), torch.randn(2, 5).double())] * 2 for _ in range(2)]
    proprio, task = torch.randn(2, 2, 3).double(), torch.tensor([0, 1])

    def difference():
        one, other = (model(seen, proprio, task=task).summary for seen in views)
        return one - other

    unscaled = difference()  # a new network does not scale yet
    seen = [model.summary_in[n](views[0][n][1]) - model.summary_in[n](views[1][n][1]) for n in range(2)]
    torch.testing.assert_close(unscaled, sum(seen))
    torch.nn.init.normal_(model.scale.weight)
    scale = 1 + model.scale(model.instruction.table[task, 0])
    torch.testing.assert_close(difference(), scale * unscaled)
    assert not torch.allclose(scale[0], scale[1])


def test_an_instruction_has_a_scale_and_shift_for_each_backbone_that_takes_them():
    known, task = Instructions(("left", "right")), torch.tensor([1, 0])
    model = InfoEmbedder([(6, 5), (6, 5)], (2, 3), Size(16, 4), 1, tasks=known, film_dims=(7, 7))
    assert [x.shape for x in model.film(task)] == [(2, 14), (2, 14)]
    assert not any(x.any() for x in model.film(task))  # a new network does not know what instructions mean
    one, other = randomized(model).film(task)
    assert not torch.allclose(one, other)
    assert not torch.allclose(one[0], one[1])
    with pytest.raises(ValueError, match="several instructions: give `task`"):
        model.film(None)
    assert InfoEmbedder([(6, 5)], (2, 3), Size(16, 4), 1, tasks=known, film_dims=(0,)).film(task) == []
    assert InfoEmbedder([(6, 5)], (2, 3), Size(16, 4), 1, film_dims=(7,)).film(None) == []


def test_a_lost_camera_leaves_nothing_of_what_it_saw():
    model = randomized(embedder(droppable=True))
    proprio, dropped = torch.randn(2, 2, 3).double(), torch.tensor([[False, True], [False, False]])
    first, second = ([(torch.randn(2, 7, 6).double(), torch.randn(2, 5).double())] * 2 for _ in range(2))
    one, other = (model([first[0], seen], proprio, dropped) for seen in (first[1], second[1]))
    for mine, theirs in zip(one, other, strict=True):  # memory and summary
        torch.testing.assert_close(mine[0], theirs[0])
        assert not torch.allclose(mine[1], theirs[1])


def test_a_latent_changes_the_velocity_and_its_absence_is_allowed():
    model = randomized(ActionDecoder((6, 3), Size(16, 4), 2, latent_dim=5))
    context = model.context(observed(2, 4, 16))
    x, t = torch.randn(2, 6, 3, dtype=torch.float64), torch.rand(2, dtype=torch.float64)
    velocities = [model(x, t, context, latent=z) for z in torch.randn(2, 2, 5, dtype=torch.float64)]
    assert not torch.allclose(*velocities)
    # draws of one observation, each with its latent: one call equals separate calls
    z = torch.randn(2, 3, 5, dtype=torch.float64)
    wide = model(x.repeat_interleave(3, 0), t.repeat_interleave(3), context, latent=z.flatten(0, 1))
    for draw in range(3):
        torch.testing.assert_close(
            wide.unflatten(0, (2, 3))[:, draw], model(x, t, context, latent=z[:, draw])
        )


def test_the_summary_reaches_the_velocity_of_every_draw_of_its_observation():
    model, memory = decoder(causal=True), torch.randn(2, 4, 16, dtype=torch.float64)
    x, t = torch.randn(6, 6, 3, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    summary = torch.randn(2, 16, dtype=torch.float64)
    changed = torch.stack([summary[0], summary[1] + 1])
    one, other = (model(x, t, model.context(Observation(memory, s))) for s in (summary, changed))
    torch.testing.assert_close(one[:3], other[:3])
    assert ((one[3:] - other[3:]).abs().amax(dim=(1, 2)) > 1e-6).all()


def separate(stacked_block, expert, d_model, num_heads):
    """A block of ordinary layers with one expert's weights."""
    block = DecoderBlock(d_model, num_heads)
    weights = {
        name: p[expert].T if name.endswith("weight") else p[expert]
        for name, p in stacked_block.state_dict().items()
    }
    block.load_state_dict(weights)
    return block


@pytest.mark.parametrize("causal", [True, False])
def test_stacked_experts_equal_separate_modules(causal):
    torch.manual_seed(0)
    num_experts, batch, draws, steps, length, d_model = 3, 2, 4, 5, 7, 16
    stacked = DecoderBlock(d_model, 2, lambda i, o: StackedLinear(num_experts, i, o))
    for p in stacked.parameters():
        p.data.normal_(0, 0.2)
    x = torch.randn(num_experts, batch * draws, steps, d_model)
    condition = torch.randn(batch * draws, d_model)
    memory = torch.randn(batch, length, d_model)
    mask = torch.rand(batch * draws, steps) < 0.7
    mask[:, 0] = True
    mask = None if causal else mask
    keys_values = stacked.cross_attention.keys_values(memory.expand(num_experts, -1, -1, -1))
    together = stacked(x, condition.expand(num_experts, -1, -1), keys_values, mask, causal)
    together.sum().backward()
    for e in range(num_experts):
        block = separate(stacked, e, d_model, 2)
        alone = block(x[e], condition, block.cross_attention.keys_values(memory), mask, causal)
        torch.testing.assert_close(together[e], alone, atol=1e-5, rtol=1e-5)
        alone.sum().backward()
        for (name, p), q in zip(block.named_parameters(), stacked.parameters(), strict=True):
            grad = q.grad[e].T if name.endswith("weight") else q.grad[e]
            torch.testing.assert_close(p.grad, grad, atol=2e-4, rtol=1e-4)


def test_a_taken_expert_shares_memory_and_acts_alone():
    torch.manual_seed(0)
    layers = torch.nn.Sequential(StackedLinear(3, 4, 5), torch.nn.LayerNorm(5), StackedLinear(3, 5, 2))
    x = torch.randn(3, 6, 4)
    whole = layers(x)
    for e in range(3):
        taken = take_expert(layers, e)
        torch.testing.assert_close(taken(x[e : e + 1])[0], whole[e])
        assert taken[0].weight.data_ptr() == layers[0].weight[e].data_ptr()
        assert taken[0].weight.shape == (1, 4, 5)
    assert layers[0].weight.shape == (3, 4, 5)


@torch.no_grad()
def test_a_compiled_integration_finds_the_chosen_expert_where_the_last_one_was():
    torch.manual_seed(0)
    layers = torch.nn.Sequential(StackedLinear(3, 4, 5), torch.nn.LayerNorm(5), StackedLinear(3, 5, 2))
    x = torch.randn(1, 6, 4)
    places = set()
    for e in (0, 2, 1, 2):
        expected = take_expert(layers, e)(x)
        with flow.compiled(flow.integrate):
            taken = take_expert(layers, torch.tensor([e]))
        assert torch.equal(taken(x), expected)
        places.add((id(taken), taken[0].weight.data_ptr(), taken[2].bias.data_ptr()))
        for parameter in layers.parameters():  # what is taken next is of the weights as they are then
            parameter.mul_(1.5)
    assert len(places) == 1
    uncompiled = [take_expert(layers, torch.tensor([1])) for _ in range(2)]  # here threads share nothing
    assert len({id(taken), *map(id, uncompiled)}) == 3


def test_stacked_layers_start_as_ordinary_ones_do():
    torch.manual_seed(0)
    stacked, plain = StackedLinear(40, 30, 50), torch.nn.Linear(30, 50)
    assert stacked.weight.std().item() == pytest.approx(plain.weight.std().item(), rel=0.05)
    assert stacked.bias.std().item() == pytest.approx((1 / 30) ** 0.5 / 3**0.5, rel=0.05)


@pytest.mark.parametrize("latent_dim", [None, 5])
@pytest.mark.parametrize("causal", [True, False])
def test_a_time_for_each_action_that_is_the_same_for_all_changes_nothing(causal, latent_dim):
    model = randomized(ActionDecoder((6, 3), Size(16, 4), 2, causal, latent_dim)).float()
    context = model.context(observed(torch.randn(4, 5, 16)))
    x, t = torch.randn(4, 6, 3), torch.rand(4)
    latent = None if latent_dim is None else torch.randn(4, latent_dim)
    alone = model(x, t, context, latent=latent)
    assert torch.equal(model(x, t[:, None].expand(-1, 6), context, latent=latent), alone)
    all_given = model(x, torch.ones(4, 6), context, latent=latent)
    assert torch.equal(all_given, model(x, torch.ones(4), context, latent=latent))


def test_given_actions_have_a_time_of_their_own():
    model = decoder(True)
    context = model.context(observed(1, 4, 16))
    x = torch.randn(1, 6, 3, dtype=torch.float64)
    t = torch.tensor([[1, 1, 0.4, 0.4, 0.4, 0.4]], dtype=torch.float64)
    mixed = model(x, t, context)
    # Causal attention: the first two see only each other, both at time 1.
    torch.testing.assert_close(mixed[:, :2], model(x, t[:, 0], context)[:, :2])
    noisy = model(x, t[:, 5], context)
    assert not torch.allclose(mixed[:, 2:], noisy[:, 2:], rtol=1e-3)  # the others see that two are given


def test_experts_have_times_of_each_action_as_separate_modules_do():
    num_experts, batch, steps, d_model = 3, 4, 5, 16
    stacked = DecoderBlock(d_model, 2, lambda i, o: StackedLinear(num_experts, i, o))
    for p in stacked.parameters():
        p.data.normal_(0, 0.2)
    x, condition = torch.randn(num_experts, batch, steps, d_model), torch.randn(batch, 2, d_model)
    memory, given = torch.randn(batch, 7, d_model), torch.arange(steps) < torch.tensor([[0], [1], [3], [5]])
    keys_values = stacked.cross_attention.keys_values(memory.expand(num_experts, -1, -1, -1))
    together = stacked(x, condition.expand(num_experts, -1, -1, -1), keys_values, None, True, given)
    for e in range(num_experts):
        block = separate(stacked, e, d_model, 2)
        alone = block(x[e], condition, block.cross_attention.keys_values(memory), None, True, given)
        torch.testing.assert_close(together[e], alone, atol=1e-5, rtol=1e-5)

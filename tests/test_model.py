import copy
import pickle

import pytest
import torch

from model import Attention, LargerUnet, NormBlock, U_net, sinusoidal_embedding

STRONG = {"widths": (16,), "blocks": 2, "bottleneck": 32, "attention": 2, "normalise": True, "patch": 2, "dropout": 0.1}


def batch(size=2, channels=1, height=28, width=28):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, channels, height, width, generator=generator), torch.randint(1000, (size,), generator=generator)


def test_the_simple_network_has_the_weights_of_its_description():
    """Counted by hand: 3x3 and 1x1 convolutions, transposed 2x2 convolutions and linear layers, each with its bias."""
    def res_block(a, b):
        return (9 * a * b + b) + (256 * b + b) + (9 * b * b + b) + (a * b + b if a != b else 0)

    def up(a):
        return 4 * a * a + a
    expected = (2 * (256 * 256 + 256) + res_block(1, 64) + res_block(64, 128) + res_block(128, 128)
                + up(128) + res_block(128 + 128, 128) + up(128) + res_block(128 + 64, 64) + 64 + 1)
    assert sum(p.numel() for p in U_net().parameters()) == expected


@pytest.mark.parametrize("size", [8, 28, 30, 33, 64])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("network", [{}, STRONG])
def test_output_has_the_shape_of_the_input(size, channels, network):
    x, t = batch(2, channels, size, size)
    assert U_net(in_channels=channels, **network)(x, t).shape == x.shape


def test_images_need_not_be_square_and_networks_may_be_deeper():
    x, t = batch(2, 3, 8, 45)
    assert U_net("cpu", 3, 32, widths=(8, 16, 24, 32))(x, t).shape == x.shape


def test_padding_repeats_the_border_and_is_cropped_away():
    """A network of one level pads to even sizes."""
    x, t = batch(2, 1, 9, 11)
    model = U_net(t_dim=8, widths=(8,))
    by_hand = torch.cat([x, x[:, :, -1:]], dim=2)
    by_hand = torch.cat([by_hand, by_hand[:, :, :, -1:]], dim=3)
    torch.testing.assert_close(model(x, t), model(by_hand, t)[:, :, :9, :11])


def test_sinusoidal_embedding_is_the_papers():
    embedding = sinusoidal_embedding(torch.tensor([0, 1, 999]), 6).double()
    for row, t in zip(embedding, (0, 1, 999)):
        angle = t / 10000 ** (torch.arange(3).double() / 3)
        torch.testing.assert_close(row, torch.cat([angle.sin(), angle.cos()]), rtol=0, atol=1e-4)


def test_output_depends_on_the_timestep_of_the_image_alone():
    x, _ = batch(3)
    model = U_net()
    early, late, mixed = (model(x, torch.tensor(t)) for t in ([5] * 3, [900] * 3, [5, 900, 5]))
    assert (early - late).abs().amax(dim=(1, 2, 3)).min() > 1e-3
    torch.testing.assert_close(mixed, torch.stack([early[0], late[1], early[2]]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("network", [{}, STRONG])
def test_every_parameter_gets_a_gradient(network):
    model = U_net(in_channels=3, **network)
    for parameter in model.parameters():
        if not parameter.any():  # what begins at zero lets nothing through in the first step
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    x, t = batch(4, 3)
    model(x, t).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("network", [{"widths": (32, 64)}, STRONG | {"patch": 1, "dropout": 0.0}])
def test_it_overfits_one_batch(network):
    torch.manual_seed(0)
    model = U_net(t_dim=64, **network)
    x, t = batch(4, height=8, width=8)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(300):
        loss = torch.nn.functional.mse_loss(model(x, t), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.01  # noise of variance 1: a network that ignored its input would stay near 1


def test_a_normalised_network_begins_by_predicting_zero_and_its_blocks_as_their_shortcuts():
    x, t = batch(2)
    assert not U_net(**STRONG)(x, t).any()
    x = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(NormBlock(8, 8, 6)(x, torch.ones(2, 6)), x)


def test_time_scales_and_shifts_the_normalised_channels():
    """With conv1 and conv2 the identity and norm over whole channels, the block is two lines of arithmetic."""
    block = NormBlock(8, 8, 6)
    x, time = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0)), torch.randn(2, 6)
    for conv in (block.conv1, block.conv2):
        torch.nn.init.dirac_(conv.weight), torch.nn.init.zeros_(conv.bias)

    def normalised(h):  # 8 groups of one channel
        return (h - h.mean(dim=(2, 3), keepdim=True)) / (h.var(dim=(2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()

    def silu(h):
        return h / (1 + (-h).exp())
    change = silu(time) @ block.time.weight.T + block.time.bias
    scale, shift = change[:, :8, None, None], change[:, 8:, None, None]
    expected = x + silu(normalised(silu(normalised(x))) * (1 + scale) + shift)
    torch.testing.assert_close(block(x, time), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normalise", [False, True])
def test_dropout_zeroes_its_share_in_training_alone(normalise):
    torch.manual_seed(0)
    model, zero = U_net(t_dim=8, widths=(8,), dropout=0.25, normalise=normalise), []
    model.bottleneck.conv2.register_forward_pre_hook(lambda _, inputs: zero.append((inputs[0] == 0).float().mean()))
    for training in (True, False):
        model.train(training)(*batch(16))
    assert zero[0].item() == pytest.approx(0.25, abs=0.02) and zero[1] == 0


def test_attention_is_the_softmax_of_scaled_products():
    torch.manual_seed(0)
    layer = Attention(64)  # two heads
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(2, 64, 3, 5)
    h = layer.norm(x).reshape(2, 64, 15).transpose(1, 2)
    projections = zip(layer.attention.in_proj_weight.split(64), layer.attention.in_proj_bias.split(64))
    query, key, value = ((h @ weight.T + bias).split(32, dim=2) for weight, bias in projections)  # for each head (B, H W, 32)
    heads = [torch.softmax(q @ k.transpose(1, 2) / 32**0.5, dim=-1) @ v for q, k, v in zip(query, key, value)]
    attended = torch.cat(heads, dim=2) @ layer.attention.out_proj.weight.T + layer.attention.out_proj.bias
    torch.testing.assert_close(layer(x), x + attended.transpose(1, 2).reshape(x.shape), rtol=1e-4, atol=1e-5)


def test_patches_are_channels_of_one_pixel():
    """With the network between door and exit taken out, the picture comes back as it was."""
    model = U_net(widths=(8,), t_dim=8, patch=2)
    x, t = batch(2, height=10, width=12)
    seen = []
    model.encoder[0].register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0]))
    model.out.register_forward_hook(lambda layer, inputs, output: seen[0])
    torch.testing.assert_close(model(x, t), x, rtol=0, atol=0)
    torch.testing.assert_close(seen[0][:, :, 2, 3], x[:, 0, 4:6, 6:8].flatten(1), rtol=0, atol=0)


@pytest.mark.parametrize("shape, t_shape, message", [
    ((2, 3, 28, 28), (2,), r"x of shape \(2, 3, 28, 28\): this network takes \(B, 1, H, W\)"),
    ((2, 1, 7, 28), (2,), "H and W >= 8"),
    ((1, 28, 28), (1,), "takes \\(B, 1, H, W\\)"),
    ((2, 1, 28, 28), (1,), r"t of shape \(1,\): must be \(2,\)"),
])
def test_bad_input_is_refused(shape, t_shape, message):
    with pytest.raises(ValueError, match=message):
        U_net(t_dim=8, widths=(8,))(torch.zeros(shape), torch.zeros(t_shape, dtype=torch.long))


def test_more_levels_than_an_image_can_be_halved_are_refused():
    """Where padding to a multiple of 2^levels would make an image more than twice as large."""
    x, t = batch(height=28, width=20)
    for network in ({"widths": (8,) * 5}, {"widths": (8,) * 3, "patch": 4}):
        assert U_net(t_dim=8, **network)(x, t).shape == x.shape
        deeper = network | {"widths": network["widths"] + (8, 8)}
        with pytest.raises(ValueError, match="too many levels for images of 28 x 20; each level halves them"):
            U_net(t_dim=8, **deeper)(x, t)


@pytest.mark.parametrize("arguments, message", [
    ({"t_dim": 255}, "t_dim 255"), ({"in_channels": 0}, "in_channels 0"), ({"widths": ()}, r"widths \(\)"),
    ({"widths": (12,), "normalise": True}, "multiples of 8"), ({"blocks": 0}, "blocks 0"),
    ({"bottleneck": 48, "attention": 1}, "bottleneck of 48 channels"), ({"bottleneck": 0}, "bottleneck 0"),
    ({"dropout": 1.0}, r"dropout 1.0: must be in \[0, 1\)")])
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        U_net(**arguments)


def test_the_simple_network_is_the_larger_one_without_what_that_adds():
    """Written out twice, they must agree: same weights, same output."""
    x, t = batch(3, 3, 13, 18)
    simple, larger = U_net(in_channels=3, num_classes=4), LargerUnet(in_channels=3, num_classes=4)
    larger.load_state_dict(simple.state_dict())
    label = torch.tensor([0, 3, 4])
    assert type(U_net()) is U_net and type(U_net(patch=2)) is LargerUnet
    torch.testing.assert_close(larger(x, t, label), simple(x, t, label), rtol=0, atol=1e-6)


@pytest.mark.parametrize("network", [{}, STRONG])
def test_no_images_give_no_images(network):
    x, t = torch.empty(0, 3, 28, 30), torch.empty(0, dtype=torch.long)
    assert U_net(in_channels=3, **network)(x, t).shape == x.shape


@pytest.mark.parametrize("network", [{}, STRONG])
def test_a_network_without_classes_has_no_label_and_with_them_one_more_entry(network):
    names = set(U_net(**network).state_dict())
    assert set(U_net(num_classes=7, **network).state_dict()) - names == {"label_embedding.weight"}
    assert U_net(num_classes=7, **network).label_embedding.weight.shape == (8, 256)


@pytest.mark.parametrize("network", [{}, STRONG | {"dropout": 0.0}])
def test_a_label_is_added_to_the_embedding_of_the_time_and_none_is_the_last_row(network):
    torch.manual_seed(0)
    model, plain = U_net(t_dim=32, num_classes=3, **network), U_net(t_dim=32, **network)
    for parameter in model.parameters():
        if not parameter.any():  # the labels and what else begins at zero
            torch.nn.init.normal_(parameter, std=0.1)
    plain.load_state_dict({name: value for name, value in model.state_dict().items()
                           if name not in ("label_embedding.weight", "_extra_state")}, strict=False)
    x, t = batch(2)
    for number in range(4):
        moved = model.label_embedding.weight[number]
        with torch.no_grad():  # the last bias of time_mlp is added to every embedding
            plain.time_mlp[2].bias.copy_(model.time_mlp[2].bias + moved)
        label = torch.full((2,), number)
        torch.testing.assert_close(model(x, t, label), plain(x, t), rtol=1e-4, atol=1e-5)
    assert torch.equal(model(x, t), model(x, t, torch.full((2,), 3)))
    assert (model(x, t) - model(x, t, torch.tensor([0, 1]))).abs().max() > 1e-4


@pytest.mark.parametrize("num_classes, label, message", [
    (3, torch.tensor([0, 4]), "label 4: must be in 0 ... 2, or 3 for no label"),
    (3, torch.tensor([-1, 0]), "label -1: must be in"),
    (3, torch.tensor([0]), r"label of shape \(1,\) and type torch.int64: must be \(2,\)"),
    (3, torch.tensor([0.0, 1.0]), "type torch.float32"),
    (3, 2, "label 2: must be a tensor"), (3, [1, 2], r"label \[1, 2\]: must be a tensor"),
    (0, torch.tensor([0, 0]), "label: this network was built without classes")])
def test_a_bad_label_is_refused(num_classes, label, message):
    with pytest.raises(ValueError, match=message):
        U_net(t_dim=8, widths=(8,), num_classes=num_classes)(*batch(2), label)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_network_in_half_precision_takes_images_in_it(dtype):
    x, t = batch(2)
    assert U_net(t_dim=8, widths=(8,)).to(dtype)(x.to(dtype), t).dtype == dtype


@pytest.mark.parametrize("network", [{}, STRONG])
def test_a_network_can_be_copied_and_pickled(network):
    model = U_net(**network).eval()
    x, t = batch(1)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x, t), model(x, t)) and other.network == model.network


@pytest.mark.filterwarnings("ignore")  # tracing is on its way out
@pytest.mark.parametrize("network", [{}, STRONG | {"num_classes": 3}])
def test_a_network_can_be_compiled_exported_and_traced(network):
    """Whole, without a graph break, and exported for batches of any size from two on."""
    torch.manual_seed(0)
    model = U_net(t_dim=16, **{"widths": (8,)} | network).eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    some, more = ((*batch(size), torch.arange(size) % 3 if model.network["num_classes"] else None)
                  for size in (3, 5))
    of_any_size = {0: torch.export.Dim("batch", min=2, max=99)}
    dynamic = (of_any_size, of_any_size, of_any_size if model.network["num_classes"] else None)
    for other in (torch.compile(model, backend="eager", fullgraph=True),
                  torch.export.export(model, some, dynamic_shapes=dynamic).module()):
        for inputs in (some, more):
            torch.testing.assert_close(other(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)
    traced = torch.jit.trace(model, some[:2])
    torch.testing.assert_close(traced(*some[:2]), model(*some[:2]), rtol=1e-4, atol=1e-5)

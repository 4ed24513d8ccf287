import pytest
import torch

from model import U_net, sinusoidal_embedding


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
def test_output_has_the_shape_of_the_input(size, channels):
    x, t = batch(2, channels, size, size)
    assert U_net(in_channels=channels)(x, t).shape == x.shape


def test_images_need_not_be_square_and_networks_may_be_deeper():
    x, t = batch(2, 3, 8, 45)
    assert U_net("cpu", 3, 32, widths=(8, 16, 24, 32))(x, t).shape == x.shape


def test_padding_does_not_reach_images_that_need_none():
    """A network of one level pads to even sizes: the crop of a padded image is what padding by hand gives."""
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


def test_every_parameter_gets_a_gradient():
    model = U_net(in_channels=3)
    x, t = batch(4, 3)
    model(x, t).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_it_overfits_one_batch():
    torch.manual_seed(0)
    model = U_net(t_dim=64, widths=(32, 64))
    x, t = batch(4, height=8, width=8)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(300):
        loss = torch.nn.functional.mse_loss(model(x, t), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.01  # noise of variance 1: a network that ignored its input would stay near 1


@pytest.mark.parametrize("shape, t_shape, message", [
    ((2, 3, 28, 28), (2,), r"x of shape \(2, 3, 28, 28\): this network takes \(B, 1, H, W\)"),
    ((2, 1, 7, 28), (2,), "H and W >= 8"),
    ((1, 28, 28), (1,), "takes \\(B, 1, H, W\\)"),
    ((2, 1, 28, 28), (1,), r"t of shape \(1,\): must be \(2,\)"),
])
def test_bad_input_is_refused(shape, t_shape, message):
    with pytest.raises(ValueError, match=message):
        U_net(t_dim=8, widths=(8,))(torch.zeros(shape), torch.zeros(t_shape, dtype=torch.long))


@pytest.mark.parametrize("arguments, message", [
    ({"t_dim": 255}, "t_dim 255"), ({"in_channels": 0}, "in_channels 0"), ({"widths": ()}, r"widths \(\)")])
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        U_net(**arguments)

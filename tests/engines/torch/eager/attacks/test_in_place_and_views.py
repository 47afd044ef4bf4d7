"""Attacks on in-place operators and views: all as in plain training."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.engines.torch.compare import quick
from tests.engines.torch.eager.attacks.networks import ROWS, WIDTH, check_body

__all__ = ["quick"]  # a fixture


@pytest.mark.slow
@pytest.mark.guard
def test_in_place_chain_on_one_tensor() -> None:
    check_body(lambda i, h: h.sin().add_(1).mul_(2).sub_(h).relu_())


def test_in_place_chain_on_a_view() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        y = h * 2
        y[:, : WIDTH // 2].add_(3).mul_(0.5)
        y[:, WIDTH // 2 :].sub_(1).mul_(h[:, : WIDTH // 2]).abs_()
        return y.sin()

    check_body(body)


def test_views_of_views_then_in_place() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        y = h * 2
        v = y.view(ROWS, 2, WIDTH // 2).transpose(1, 2)[1:, :, 0]
        v.mul_(3).add_(h.view(ROWS, 2, WIDTH // 2)[1:, 1])
        w = y.t()[2:5].unsqueeze(0).squeeze(0)
        w.tanh_()
        return y.cos()

    check_body(body)


def test_in_place_on_the_base_is_seen_through_an_old_view() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        y = h * 3
        view = y[:, ::2]
        y.add_(h)
        return torch.cat([view.sin(), y[:, 1::2].cos()], 1)

    check_body(body)


def test_expand_and_in_place_on_what_was_expanded() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        row = h.mean(0, keepdim=True)
        wide = row.expand(ROWS, WIDTH)
        y = (wide * h).sin()
        row.add_(1)
        return y + row.expand(ROWS, WIDTH).tanh().detach() * h

    def body_safe(i: int, h: Tensor) -> Tensor:
        row = h.mean(0, keepdim=True)
        y = row.expand(ROWS, WIDTH) + h.sin()
        row.add_(1).mul_(2)
        return y.tanh() * row.expand_as(h)

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        check_body(body)
    check_body(body_safe)


def test_slice_assignment() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        y = torch.zeros_like(h)
        y[:, :8] = h[:, 8:].exp()
        y[::2, 8:] = h[::2, :8].sin()
        y[1::2, 8:] = 0.5
        return y.tanh() * h

    check_body(body)


def test_slice_assignment_into_uninitialised_memory() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        y = torch.empty(ROWS, 2 * WIDTH)
        y[:, :WIDTH] = h.exp()
        y[:, WIDTH:] = h.sin()
        return (y.tanh() * y)[:, 8:24]

    check_body(body)


def test_copy_between_views_of_one_storage() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        y = h * 2
        y[:, :4].copy_(y[:, 4:8])
        y[:, 12:].copy_(y[:, :4])
        return y.sin() * h

    check_body(body)


def test_index_put_and_scatter() -> None:
    index = torch.arange(ROWS).flip(0)[: ROWS // 2]

    def body(i: int, h: Tensor) -> Tensor:
        y = h * 2
        y[index] = h[: ROWS // 2].sin()
        y.index_put_((index,), h[ROWS // 2 :], accumulate=True)
        y.scatter_(1, torch.zeros(ROWS, 1, dtype=torch.long), h[:, :1].cos())
        y.scatter_add_(1, torch.ones(ROWS, 2, dtype=torch.long), h[:, :2])
        y.index_add_(0, index, h[: ROWS // 2])
        y.masked_fill_(h > 0.7, 0.25)
        return y.tanh() * h

    check_body(body)


def test_out_arguments() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        with torch.no_grad():
            scale = torch.empty(WIDTH)
            torch.mean(h, 0, out=scale)
            big = torch.zeros(ROWS, WIDTH)
            torch.exp(h, out=big)
            torch.add(big, 1, out=big)
        return (h * scale).sin() * big

    check_body(body)


def test_operators_that_return_several_tensors_one_of_them_modified() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        values, order = h.sort(1)
        values = values * 2
        a, b = values.chunk(2, 1)
        top, at = torch.topk(h, 4, 1)
        a = a.clone().add_(top.sum(1, keepdim=True))
        return torch.cat([a, b], 1).gather(1, order).tanh() + at.float().mean()

    check_body(body)


def test_unsafe_views_and_reshapes() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        y = h.t().reshape(-1).reshape(WIDTH, ROWS).t().contiguous()
        z = F.fold(F.unfold(y.view(1, 1, ROWS, WIDTH), (2, 2), stride=2), (ROWS, WIDTH), (2, 2), stride=2)
        return torch.flip(z.view(ROWS, WIDTH).sin(), (1,)).roll(3, 0)

    check_body(body)


def test_strided_and_complex_values() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        z = torch.fft.fft(h, dim=1)
        w = (z.conj() * (0.1 * z).sin().conj()).resolve_conj() + z.imag.cos() * 1j
        w.imag.mul_(0.5)
        return torch.fft.ifft(w, dim=1).real.tanh() + torch.view_as_real(z).sum(-1).sin() + z.conj().imag.sin()

    check_body(body)


def test_resize_and_set_do_no_harm() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        scratch = torch.empty(0)
        with torch.no_grad():
            scratch.resize_(ROWS, WIDTH).copy_(h).mul_(2)
            other = torch.empty(0).set_(scratch)
            other.add_(1)
        return (h * scratch).sin() * h

    check_body(body)


def test_activation_changed_through_data() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        y = h.exp()
        y.data.mul_(0.5)
        z = y.sin()
        return z * h

    check_body(body)


def test_saved_activation_changed_through_data() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        y = h.exp()
        z = y.sin()
        y.data.mul_(0.5)
        return z * h

    check_body(body)


def test_activation_given_other_data() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        y = h * 2
        y.data = h.detach().cos()
        return y.sin() * h

    check_body(body)

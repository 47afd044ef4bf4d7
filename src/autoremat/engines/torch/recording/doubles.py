"""Makes doubles of real tensors: other tensors on the same memory."""

from __future__ import annotations

from torch import Tensor, nn

from autoremat.engines.torch.operators.history import is_leaf


class Doubles:
    """Real tensors under another identity, on the same memory.

    They keep three things out of a recording: the user's hooks on parameters, which may step an optimizer; the graph
    that an input comes from; and the user's own tensor, where an input or a buffer is overwritten with something
    differentiable and would become part of the recording's graph.
    """

    def __init__(self) -> None:
        self._doubles: dict[int, tuple[Tensor, Tensor]] = {}
        self._own: set[int] = set()
        """The identities of the doubles themselves."""

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return the double of a tensor, always the same one.

        A double is its own double.
        """
        if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer) or id(tensor) in self._own:
            return tensor
        if id(tensor) not in self._doubles:
            double = tensor.detach()
            if isinstance(tensor, nn.Parameter):
                double = nn.Parameter(double, requires_grad=tensor.requires_grad)
            else:
                double.requires_grad_(tensor.requires_grad)
            vars(double).update(vars(tensor))
            if is_leaf(tensor):
                double.grad = tensor.grad
            self._doubles[id(tensor)] = tensor, double
            self._own.add(id(double))
        return self._doubles[id(tensor)][1]

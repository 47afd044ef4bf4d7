"""Makes twins of real tensors: other tensors on the same memory."""

from __future__ import annotations

from torch import Tensor, nn

from autoremat.engines.torch.operators.history import is_leaf


class Twins:
    """Real tensors under another identity, on the same memory.

    They keep three things out of a recording: the user's hooks on parameters, which may step an optimizer; the graph
    that an input comes from; and the user's own tensor, where an input or a buffer is overwritten with something
    differentiable and would become part of the recording's graph.
    """

    def __init__(self) -> None:
        self._twins: dict[int, tuple[Tensor, Tensor]] = {}
        self._own: set[int] = set()
        """The identities of the twins themselves."""

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return the twin of a tensor, always the same one.

        A twin is its own twin.
        """
        if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer) or id(tensor) in self._own:
            return tensor
        if id(tensor) not in self._twins:
            twin = tensor.detach()
            if isinstance(tensor, nn.Parameter):
                twin = nn.Parameter(twin, requires_grad=tensor.requires_grad)
            else:
                twin.requires_grad_(tensor.requires_grad)
            vars(twin).update(vars(tensor))
            if is_leaf(tensor):
                twin.grad = tensor.grad
            self._twins[id(tensor)] = tensor, twin
            self._own.add(id(twin))
        return self._twins[id(tensor)][1]

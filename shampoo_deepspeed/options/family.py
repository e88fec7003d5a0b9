"""The family of rules: what each preconditioner is made of. A new one is a line here and a file with its class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

PACKAGE = "shampoo_deepspeed.algorithm.preconditioners"


class Parts(NamedTuple):
    """What options need to know about a preconditioner.

    Attributes:
        place: its class, a subclass of ``algorithm.preconditioners.Preconditioner``, or its place, "module:class".
        statistics: what goes into factor matrices: ``"gradient"``, or ``"whitened"``, gradients multiplied along the
            other modes by inverse roots; None: there are no factor matrices.
        in_basis: Adam runs in eigenbases, which take the place of inverse roots.
        orthogonalises: the update is orthogonalised, each block as a matrix.
    """

    place: str | Callable[..., Any]
    statistics: str | None
    in_basis: bool = False
    orthogonalises: bool = False

    @property
    def takes_roots(self) -> bool:
        """Whether inverse roots are part of the state."""
        return self.statistics is not None and not self.in_basis

    @property
    def whitens(self) -> bool:
        """Whether statistics are computed from whitened gradients."""
        return self.statistics == "whitened"


FAMILY: dict[str, Parts] = {
    "shampoo": Parts(f"{PACKAGE}.shampoo:ShampooPreconditioner", "gradient"),
    "soap": Parts(f"{PACKAGE}.soap:SOAPPreconditioner", "gradient", in_basis=True),
    "kl_shampoo": Parts(f"{PACKAGE}.shampoo:KLShampooPreconditioner", "whitened"),
    "kl_soap": Parts(f"{PACKAGE}.kl_soap:KLSOAPPreconditioner", "whitened", in_basis=True),
    "soap_muon": Parts(f"{PACKAGE}.muon:SOAPMuonPreconditioner", "gradient", in_basis=True, orthogonalises=True),
    "muon": Parts(f"{PACKAGE}.muon:MuonPreconditioner", None, orthogonalises=True),
}

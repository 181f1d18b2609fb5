"""Systems: causal operators as immutable value objects, one file per realisation."""

from gramian.systems._state import State
from gramian.systems._system import Recurrence, System
from gramian.systems.companion import CompanionRecurrence, CompanionState
from gramian.systems.dplr import DPLR, DPLRRecurrence, DPLRState
from gramian.systems.fir import FIR, FIRRecurrence, FIRState
from gramian.systems.lattice import LatticeRecurrence, LatticeState
from gramian.systems.modal import Modal, ModalRecurrence, ModalState
from gramian.systems.state_space import StateSpace, StateSpaceRecurrence, StateSpaceState
from gramian.systems.transfer_function import TransferFunction

__all__ = [
    "DPLR",
    "FIR",
    "CompanionRecurrence",
    "CompanionState",
    "DPLRRecurrence",
    "DPLRState",
    "FIRRecurrence",
    "FIRState",
    "LatticeRecurrence",
    "LatticeState",
    "Modal",
    "ModalRecurrence",
    "ModalState",
    "Recurrence",
    "State",
    "StateSpace",
    "StateSpaceRecurrence",
    "StateSpaceState",
    "System",
    "TransferFunction",
]

"""Systems: causal operators as immutable value objects, one file per realisation."""

from gramian.systems._state import State
from gramian.systems._system import Recurrence, System
from gramian.systems.companion import CompanionRecurrence, CompanionState
from gramian.systems.convert import to_fir, to_modal, to_state_space, to_transfer_function
from gramian.systems.dplr import DPLR, DPLRRecurrence, DPLRState
from gramian.systems.fir import FIR, FIRRecurrence, FIRState
from gramian.systems.interop import from_control, from_zpk, to_control, to_zpk
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
    "from_control",
    "from_zpk",
    "to_control",
    "to_fir",
    "to_modal",
    "to_state_space",
    "to_transfer_function",
    "to_zpk",
]

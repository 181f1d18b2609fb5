"""Systems: causal operators as immutable value objects, one file per realisation."""

from gramian.systems._state import State
from gramian.systems._system import Recurrence, System
from gramian.systems.fir import FIR, FIRRecurrence, FIRState
from gramian.systems.modal import Modal, ModalRecurrence, ModalState
from gramian.systems.state_space import StateSpace, StateSpaceRecurrence, StateSpaceState
from gramian.systems.transfer_function import (
    CompanionRecurrence,
    CompanionState,
    TransferFunction,
)

__all__ = [
    "FIR",
    "CompanionRecurrence",
    "CompanionState",
    "FIRRecurrence",
    "FIRState",
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

"""Systems: causal operators as immutable value objects, with one file for each realization."""

from gramian.systems._modal_recurrence import ModalRecurrence, ModalState
from gramian.systems._pausing import Pause, PausedOperator
from gramian.systems._recurrence import Recurrence
from gramian.systems._state import State, define_state
from gramian.systems._system import System, TimeInvariantSystem, working_dtype
from gramian.systems.blocks import BlockForm, Blocks
from gramian.systems.companion import CompanionRecurrence, CompanionState
from gramian.systems.convert import (
    gated_convolution,
    to_dense_operator,
    to_fir,
    to_modal,
    to_state_space,
    to_time_varying,
    to_transfer_function,
)
from gramian.systems.dense_operator import (
    DenseOperator,
    DenseOperatorRecurrence,
    DenseOperatorState,
)
from gramian.systems.dplr import DPLR, DPLRRecurrence, DPLRState
from gramian.systems.fir import (
    FIR,
    FIRRecurrence,
    FIRState,
    FIRWindowRecurrence,
    FIRWindowState,
)
from gramian.systems.interop import from_control, from_zpk, to_control, to_zpk
from gramian.systems.lattice import LatticeRecurrence, LatticeState
from gramian.systems.modal import Modal
from gramian.systems.state_space import StateSpace, StateSpaceRecurrence, StateSpaceState
from gramian.systems.time_varying import TimeVarying, TimeVaryingRecurrence, TimeVaryingState
from gramian.systems.transfer_function import TransferFunction

__all__ = [
    "DPLR",
    "FIR",
    "BlockForm",
    "Blocks",
    "CompanionRecurrence",
    "CompanionState",
    "DPLRRecurrence",
    "DPLRState",
    "DenseOperator",
    "DenseOperatorRecurrence",
    "DenseOperatorState",
    "FIRRecurrence",
    "FIRState",
    "FIRWindowRecurrence",
    "FIRWindowState",
    "LatticeRecurrence",
    "LatticeState",
    "Modal",
    "ModalRecurrence",
    "ModalState",
    "Pause",
    "PausedOperator",
    "Recurrence",
    "State",
    "StateSpace",
    "StateSpaceRecurrence",
    "StateSpaceState",
    "System",
    "TimeInvariantSystem",
    "TimeVarying",
    "TimeVaryingRecurrence",
    "TimeVaryingState",
    "TransferFunction",
    "define_state",
    "from_control",
    "from_zpk",
    "gated_convolution",
    "to_control",
    "to_dense_operator",
    "to_fir",
    "to_modal",
    "to_state_space",
    "to_time_varying",
    "to_transfer_function",
    "to_zpk",
    "working_dtype",
]

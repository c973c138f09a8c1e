"""MPI by mpi4py, which is loaded only under an MPI launcher, and started only if it is the
launcher's own.
"""

import os
import warnings
from typing import Any

from data_prep.errors import UserError, explained

INSTALL_MPI = "pip install mpi4py mpich brings an MPI that works, to be started by its own mpiexec"
OPEN_MPI_VARIABLE = "OMPI_COMM_WORLD_SIZE"
OPEN_MPI = "Open MPI"


def start_mpi() -> Any:
    """mpi4py's MPI, started; it ends with this process.

    Raises UserError where mpi4py can't be used, or loads another MPI than Open MPI under the
    mpiexec of that: MPICH 5 would abort in C.
    """
    unusable = "started by an MPI launcher, but mpi4py can't be used"
    with (
        explained((ImportError, RuntimeError), unusable, INSTALL_MPI),
        warnings.catch_warnings(),
    ):
        # It warns of another MPI's launcher, which is said better here.
        warnings.simplefilter("ignore")
        import mpi4py

        mpi4py.rc.initialize = False  # the import would start it
        mpi4py.rc.finalize = True
        from mpi4py import MPI
    vendor, version = MPI.get_vendor()
    if OPEN_MPI_VARIABLE in os.environ and vendor != OPEN_MPI:
        release = ".".join(map(str, version))
        raise UserError(
            f"the launcher is {OPEN_MPI}'s, but mpi4py would load {vendor} {release}, which ends "
            f"in an abort; use the mpiexec of {vendor}, or set MPI4PY_LIBMPI to the path of "
            f"{OPEN_MPI}'s libmpi.so.40"
        )
    if not MPI.Is_initialized():
        MPI.Init_thread()
    return MPI

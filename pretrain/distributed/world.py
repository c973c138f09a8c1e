"""Who am I in this launch, from the variables that the launcher set. No torch."""

import os
from dataclasses import dataclass

from data_prep.errors import UserError
from data_prep.slurm.step import Step, came_as_task, read_step

LET_RANK_0_SPEAK_S = 10.0  # launchers end a job at the first exit: by then one line has been said

# (rank, world size, local rank, local world size) as each launcher calls them
TORCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
DEEPSPEED_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE")
OPEN_MPI_VARIABLES = (
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
)
MPICH_VARIABLES = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
SIZE_VARIABLES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
SET_BY_SRUN_TOO = "PMI_SIZE"  # by its --mpi, for what it starts and all below


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among those of the launch."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    launched_by_mpi: bool = False
    step: Step | None = None  # srun's, where that started the ranks

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0


def world_from_environment() -> World:
    """Read the launcher's variables; without any, a world of one, as in a terminal of Slurm's.

    Raises UserError where only some are there: every rank would believe that it is alone.
    """
    for names in (DEEPSPEED_VARIABLES, TORCH_VARIABLES, OPEN_MPI_VARIABLES, MPICH_VARIABLES):
        if all(name in os.environ for name in names):
            rank, world_size, local_rank, local_world_size = (
                int(os.environ[name]) for name in names
            )
            return World(
                rank=rank,
                world_size=world_size,
                local_rank=local_rank,
                local_world_size=local_world_size,
                launched_by_mpi=names in (OPEN_MPI_VARIABLES, MPICH_VARIABLES),
            )
    step = read_step()
    if step is not None and came_as_task(step):
        return World(
            rank=step.task,
            world_size=step.tasks,
            local_rank=step.local_task,
            local_world_size=step.local_tasks,
            step=step,
        )
    # Without all four no rank knows its place; with a size above one it is not alone either.
    for name in SIZE_VARIABLES:
        is_of_step = step is not None and name == SET_BY_SRUN_TOO
        if not is_of_step and int(os.environ.get(name, 1)) > 1:
            raise UserError(
                f"{name}={os.environ[name]} says that this is one of several ranks, but not all "
                "of RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE are set; start with "
                "deepspeed, torchrun, mpiexec or srun, or set all four"
            )
    return World(rank=0, world_size=1, local_rank=0, local_world_size=1)

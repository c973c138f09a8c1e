"""Samples while a run trains: what its model makes of the recipe's prompts, greedily.

The ranks share the prompts, since each has the whole model in ZeRO's stages 0 to 2, and all learn
of all samples. No random number is drawn and no gradient kept, so that no bit of the run is another
one for them.
"""

from collections.abc import Callable, Sequence

from pretrain.distributed.agree import gather
from pretrain.distributed.world import World
from pretrain.generation.continuation import Continuation, Speaker
from pretrain.generation.prompts import Prompt
from pretrain.generation.sampling import Sampling
from pretrain.metrics.step_record import Sample

GREEDY = Sampling(temperature=0.0)


class SampleWriter:
    """Continues a run's prompts on all of its ranks."""

    def __init__(
        self, speaker: Speaker, prompts: Sequence[Prompt], tokens: int, world: World
    ) -> None:
        """`tokens` is how many a continuation has at most."""
        self.speaker = speaker
        self.prompts = prompts
        self.tokens = tokens
        self.world = world

    def write(self, note_progress: Callable[[], None]) -> tuple[Sample, ...]:
        """A sample for each prompt, in order, on every rank; all ranks are to call this alike.

        `note_progress` is called after each token, so that nobody takes a long text for a stall.
        """
        model = self.speaker.model
        was_training = model.training
        model.eval()
        own = [
            self._sample(prompt, note_progress)
            for prompt in self.prompts[self.world.rank :: self.world.world_size]
        ]
        model.train(was_training)
        of_ranks = gather(own)
        samples = []
        for number in range(len(self.prompts)):
            round_of_ranks, rank = divmod(number, self.world.world_size)
            samples.append(of_ranks[rank][round_of_ranks])
        return tuple(samples)

    def _sample(self, prompt: Prompt, note_progress: Callable[[], None]) -> Sample:
        continuation = Continuation(self.speaker, prompt, self.tokens, GREEDY)
        for _ in continuation:
            note_progress()
        return Sample(
            prompt=prompt.text,
            text=continuation.text,
            bits_per_byte=continuation.bits_per_byte,
        )

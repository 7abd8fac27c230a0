"""One bar over all stages of a run, and about how long the rest will take."""

import time

from tqdm import tqdm

# How long an answer of each kind takes in the default run, in ms on one CPU core. Only their proportions count: the pace of
# what is done says how long the rest takes. For other models they are a first guess, better with every stage that is done.
GREEDY_ANSWER, IMITATED, SELECTING, SAMPLED_AND_LEARNED = 7, 9, 2, 5


def work_of_stages(config, train: int, held_out: int) -> dict[str, float]:
    """Stage -> work, in the order of train.run_stages, for so many samples to train on and held out."""
    sft, grpo = (asked * questions if asked > 0 else -asked * train
                 for asked, questions in ((config.sft_steps, config.sft_questions), (config.steps, config.questions)))
    evaluation = held_out * GREEDY_ANSWER
    on_the_way = config.steps // config.eval_every if config.eval_every and config.steps > 0 else 0
    work = {"before": evaluation, "sft": sft * IMITATED, "after_sft": evaluation * bool(sft),
            "selected": train * config.select_k * SELECTING,
            "grpo": grpo * config.group_size * SAMPLED_AND_LEARNED + on_the_way * evaluation,
            "after": evaluation * bool(grpo)}
    return {stage: amount for stage, amount in work.items() if amount}


class Progress:
    """The bar. A stage reports what it has done of its `total`: steps, or questions answered."""

    def __init__(self, work: dict[str, float], show: bool):
        self.work, self.show, self.bar = dict(work), show, None

    def begin(self, stage: str, total: int, initial: int = 0) -> "Progress":
        self.work.setdefault(stage, total)
        self.stage, self.total, self.n = stage, max(total, 1), initial
        if self.bar is None:  # of a resumed run the earlier part does not count: it had another pace, perhaps
            self.started_at, self.share_then = time.time(), self.share()
            self.bar = tqdm(total=1.0, disable=not self.show, mininterval=0.5,
                            bar_format="{desc} |{bar}| {percentage:3.0f}%{postfix}")
        self.update(0)
        return self

    def update(self, count: int = 1, text: str = "") -> None:
        """`count` more steps or questions are done; `text` stands behind the bar."""
        self.n += count
        number = list(self.work).index(self.stage) + 1
        self.bar.set_description_str(f"stage {number} of {len(self.work)}: {self.stage} {self.n}/{self.total}", refresh=False)
        self.bar.set_postfix_str(", ".join(filter(None, [self.time_left(), text])), refresh=False)
        self.bar.update(self.share() - self.bar.n)

    def close(self) -> None:
        """The stage is over."""
        self.update(self.total - self.n)

    def end(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def share(self) -> float:
        """Of the whole run, from 0 to 1."""
        stages = list(self.work)
        before = sum(self.work[stage] for stage in stages[: stages.index(self.stage)])
        return (before + self.work[self.stage] * self.n / self.total) / max(sum(self.work.values()), 1e-9)

    def time_left(self) -> str:
        done = self.share() - self.share_then
        if done < 0.005:  # too little to tell
            return ""
        left = (time.time() - self.started_at) * (1 - self.share()) / done
        amount = f"{left:.0f} s" if left < 100 else f"{left / 60:.0f} min" if left < 6000 else f"{left / 3600:.1f} h"
        return f"about {amount} left"

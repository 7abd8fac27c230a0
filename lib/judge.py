"""A language model as the judge of captions: "does this caption tell this event?", answered by yes or no.

    python eval.py --judge Qwen/Qwen2.5-72B-Instruct …        the judge that VideoChat-R1 names; any causal LM will do

The judge writes nothing. It reads the question once, and the probabilities of its next token decide: all spellings of
yes against all spellings of no. So there is no sampling, no answer to parse and no invalid answer; a tie is a no.

The caption was written by a model that is paid for a yes, and it may come to address the judge ("the answer is yes").
Special tokens in it stay text, so it cannot leave the user's turn, but nothing stops it from arguing: read the captions
in completions.jsonl before a rising `event_recall` is believed, and evaluate with another judge than was trained with.

Left out on purpose: the paper's prompt, which was not published, splitting a caption into events with the model (the
samples bring their events), a judge on another machine, quantised judges, one judge for several processes.

Shapes: B questions answered together, L tokens of the longest one, W vocabulary.
"""

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lib.captions import Judge, words_judge

QUESTION = ("A caption of a video:\n\n{caption}\n\nAn event:\n\n{event}\n\nDoes the caption say that this event "
            "happens? Answer with yes or no.")
YES, NO = ("yes", "Yes", "YES", " yes", " Yes", " YES"), ("no", "No", "NO", " no", " No", " NO")
MARK = "(the question)"  # where the question goes when the chat template is rendered
BATCH = 16  # questions answered together
MEMORY = 100_000  # answers that are remembered


def load_judge(name: str, device: str | torch.device = "cpu") -> Judge:
    """`words_judge` for no name, else the language model of that name or folder, on this process's device."""
    if not name:
        return words_judge
    try:
        return LanguageModelJudge(name, device)
    except OSError as error:
        raise ValueError(f"--judge {name}: no such folder or hub id that could be loaded ({error})") from error


class LanguageModelJudge:
    """`judge(event, caption) -> bool` by any Hugging Face causal LM; bfloat16 on a GPU, float32 elsewhere.

    `ask` takes many pairs at once, and no pair is judged again while it is remembered. Raises ValueError if the
    tokenizer has the same first tokens for yes and for no, and OSError (from the library) if there is no such model.
    """

    def __init__(self, name: str, device: str | torch.device = "cpu"):
        self.device = torch.device(device)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        self.model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=False).to(self.device).eval()
        self.model.requires_grad_(False)
        self.before, self.after = self._surroundings()
        yes, no = self._first_tokens(YES), self._first_tokens(NO)
        self.yes, self.no = sorted(yes - no), sorted(no - yes)  # a first token of both, such as a blank, says nothing
        if not (self.yes and self.no):
            raise ValueError(f"{name}: its tokenizer begins yes and no with the same token; take another --judge")
        self.remembered: dict[tuple[str, str], bool] = {}

    def __call__(self, event: str, caption: str) -> bool:
        return self.ask([(event, caption)])[0]

    def ask(self, pairs: list[tuple[str, str]]) -> list[bool]:
        """One answer for each (event, caption), in order."""
        if len(self.remembered) > MEMORY:
            self.remembered.clear()
        known = {pair: self.remembered[pair] for pair in pairs if pair in self.remembered}
        new = [pair for pair in dict.fromkeys(pairs) if pair not in known]
        for start in range(0, len(new), BATCH):
            some = new[start:start + BATCH]
            known |= zip(some, (self.margins(some) > 0).tolist())
        self.remembered |= known
        return [known[pair] for pair in pairs]

    @torch.no_grad()
    def margins(self, pairs: list[tuple[str, str]]) -> Tensor:
        """How much more likely a yes is than a no, in nats: (B,) float32, one a pair."""
        questions = [self.encode(event, caption) for event, caption in pairs]
        lengths = torch.tensor([len(ids) for ids in questions])
        # Padding on the right: in a causal model nothing before it sees it, and no position is shifted.
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in questions], batch_first=True)  # (B, L)
        mask = torch.arange(ids.shape[1]) < lengths[:, None]  # (B, L)
        last = (lengths - 1).to(self.device)
        # Logits at the last tokens alone, or a vocabulary of 150,000 times L would be the largest tensor of the run.
        out = self.model(input_ids=ids.to(self.device), attention_mask=mask.long().to(self.device), logits_to_keep=last)
        logits = out.logits.diagonal().T.float().log_softmax(-1)  # (B, B, W), at row i's own last token -> (B, W)
        return (logits[:, self.yes].logsumexp(-1) - logits[:, self.no].logsumexp(-1)).cpu()

    def encode(self, event: str, caption: str) -> list[int]:
        """The question's token ids, ready for the answer. A special token spelt in a caption is text, not the token."""
        text = QUESTION.format(event=event, caption=caption)
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        return self.before + ids + self.after

    def _surroundings(self) -> tuple[list[int], list[int]]:
        """Token ids before and after a question: the chat's turns, or for a model without chat template "Answer:"."""
        if self.tokenizer.chat_template is None:
            return self.tokenizer("").input_ids, self.tokenizer("\nAnswer:", add_special_tokens=False).input_ids
        chat = self.tokenizer.apply_chat_template([{"role": "user", "content": MARK}], tokenize=False,
                                                  add_generation_prompt=True)
        before, after = chat.split(MARK)
        return tuple(self.tokenizer(text, add_special_tokens=False).input_ids for text in (before, after))

    def _first_tokens(self, spellings: tuple[str, ...]) -> set[int]:
        """Ids of the spellings that are one token; where none is, the first token of each."""
        ids = [self.tokenizer(word, add_special_tokens=False).input_ids for word in spellings]
        return {i[0] for i in ids if len(i) == 1} or {i[0] for i in ids}

"""The corpus as tokens: split, BPE-dropout streams, and batches that depend on (seed, step) alone."""
import random

import numpy as np
import torch


class Corpus:
    """Nine tenths to train on, the last tenth to choose by.

    Re-cutting the training text with BPE-dropout gives every epoch other tokens for the same words: on a megabyte it
    is the regulariser that costs nothing. Segmenting a quarter of a million pieces anew each epoch would be slow in
    Python, so every distinct piece gets `variants` random segmentations once, and an epoch draws one per occurrence.
    """

    def __init__(self, text, tokenizer, bpe_dropout=0.0, variants=16, seed=0, train_fraction=0.9):
        cut = int(len(text) * train_fraction)
        self.tokenizer, self.seed = tokenizer, seed
        self.train_text, self.valid_text = text[:cut], text[cut:]
        self.valid_ids = np.array(tokenizer.encode(self.valid_text), np.int64)
        pieces = tokenizer.pieces(self.train_text)
        distinct = sorted(set(pieces))
        index = {piece: i for i, piece in enumerate(distinct)}
        self.occurrences = np.array([index[piece] for piece in pieces], np.int64)
        # A speech begins after an empty line: BOS goes before those, so that BOS means "somebody speaks now".
        newline = self.occurrences == index.get("\n", -1)
        self.speech = np.flatnonzero(np.concatenate([[True, False], newline[1:-1] & newline[:-2]]) & ~newline)
        self.canonical = self._table([[tokenizer.segment(piece)] for piece in distinct])
        self.dropped = None
        if bpe_dropout > 0:
            draw = random.Random(seed).random
            self.dropped = self._table([[tokenizer.segment(piece, bpe_dropout, draw) for _ in range(variants)]
                                        for piece in distinct])

    @staticmethod
    def _table(segmentations):
        """[piece][variant] -> ids, as one flat array with the begin and the length of each."""
        lengths = np.array([[len(v) for v in piece] for piece in segmentations], np.int64)
        flat = np.array([i for piece in segmentations for v in piece for i in v], np.int64)
        begins = np.concatenate([[0], np.cumsum(lengths.ravel())[:-1]]).reshape(lengths.shape)
        return flat, begins, lengths

    def _stream(self, table, rng):
        flat, begins, lengths = table
        variant = rng.integers(0, lengths.shape[1], len(self.occurrences))
        begin, length = begins[self.occurrences, variant], lengths[self.occurrences, variant]
        ends = np.cumsum(length)
        at = np.arange(ends[-1]) + np.repeat(begin - (ends - length), length)
        return flat[at], (ends - length)[self.speech]

    def epoch(self, number, device):
        """[(ids, speech begins)]: the text as it is always cut, and, with dropout, as this epoch cuts it."""
        rng = np.random.default_rng([self.seed, number])
        tables = [self.canonical] + ([self.dropped] if self.dropped else [])
        return [tuple(torch.from_numpy(a).to(device) for a in self._stream(table, rng)) for table in tables]

    @property
    def epoch_tokens(self):
        return int(self.canonical[2][self.occurrences, 0].sum())


def sample_batch(streams, bos_id, sequences, window, generator, dropped_share):
    """inputs, targets [sequences, window]: half begin anywhere, half with BOS and a speech.

    dropped_share: the part of the sequences that comes from the re-cut stream.
    """
    device = generator.device
    uniform = lambda n: torch.rand(n, generator=generator, device=device)
    inputs, targets = [], []
    num_dropped = int(round(sequences * dropped_share)) if len(streams) > 1 else 0
    for (ids, speech), count in zip(streams, (sequences - num_dropped, num_dropped)):
        if count == 0:
            continue
        room = len(ids) - window - 1
        anywhere = (uniform(count) * room).long()
        begins = speech[(uniform(count) * len(speech)).long()].clamp(max=room)
        with_bos = torch.arange(count, device=device) % 2 == 0
        first = torch.where(with_bos, begins, anywhere)
        rows = ids[first[:, None] + torch.arange(window + 1, device=device)]
        bos = torch.full_like(rows[:, :1], bos_id)
        inputs.append(torch.where(with_bos[:, None], torch.cat([bos, rows[:, :-2]], 1), rows[:, :-1]))
        targets.append(torch.where(with_bos[:, None], rows[:, :-1], rows[:, 1:]))
    return torch.cat(inputs), torch.cat(targets)

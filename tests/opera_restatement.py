"""OPERA restated as literally as possible: every step recomputes everything, products column by column, one sample.

``forward(tokens (n, t)) -> (logits (n, N), attention (n, H, P + t))``: logits after the last token and the last layer's row of
that token, for any prefix. Nothing here is shared with the library; slow on purpose.
"""

from __future__ import annotations

import torch


def restate(
    forward,
    prompt,
    image,
    *,
    num_beams,
    num_attn_candidates,
    scale_factor=50.0,
    threshold=15,
    penalty_weights=1.0,
    window_size=512,
    max_new_tokens=64,
    eos=None,
    counted=1,
    length_penalty=1.0,
    paper=False,
    image_bonus_tokens=None,
    min_rollback_index=None,
    log=None,
):
    """The answer's ids. ``image`` is [start, stop) of the image's slots among the ``prompt`` first ones.

    ``log`` collects (tokens so far, summary token, tokens kept) of every rollback.
    """
    alpha, beams, most = penalty_weights, num_beams, 5 if paper else num_attn_candidates
    bonus, earliest, scale, half = (0, 0, 1.0, torch.float32) if paper else (10, 10, 1e-7, torch.float16)
    bonus = bonus if image_bonus_tokens is None else image_bonus_tokens
    earliest = earliest if min_rollback_index is None else min_rollback_index

    def normalised(tokens):
        largest = forward(tokens)[1].amax(1)
        return largest / largest.sum(-1, keepdim=True)

    def square(tokens):
        """(n, t, t) rows of every response token among the response tokens, above the diagonal zero."""
        t = tokens.shape[1]
        out = torch.zeros(len(tokens), t, t)
        for i in range(t):
            out[:, i, : i + 1] = normalised(tokens[:, : i + 1])[:, prompt:]
        return out

    gen = torch.empty(beams, 0, dtype=torch.long)
    score = torch.tensor([0.0] + [-1e9] * (beams - 1))
    finished, done, picks = [], False, None
    history, places, made, rejected, latest = [], [], {}, {}, -1

    def offer(kept, tokens, total):
        value = total / (counted + len(tokens)) ** length_penalty
        if len(kept) < beams or value > min(v for v, _ in kept):
            kept.append((value, tokens))
            if len(kept) > beams:
                kept.remove(min(kept, key=lambda item: item[0]))

    while not done and gen.shape[1] < max_new_tokens:
        t = gen.shape[1]
        logits, _ = forward(gen)
        width = logits.shape[-1]
        values, candidates = logits.topk(min(num_attn_candidates, width), -1)
        location = torch.empty_like(candidates)
        penalised = values.clone()
        for c in range(candidates.shape[1]):
            longer = torch.cat([gen, candidates[:, c : c + 1]], 1)
            scaled = scale_factor * square(longer)
            columns = []
            for j in range(t + 1):
                product = torch.ones(beams, dtype=torch.float64)
                for i in range(j, t + 1):
                    product = product * scaled[:, i, j].double()
                column = (scale * product.float()).to(half)
                if paper and j <= t - window_size:
                    column = torch.full_like(column, -1.0)
                columns.append(column)
            phi, location[:, c] = torch.stack(columns, -1).max(-1)
            own = normalised(longer)
            if t + 1 <= bonus:
                penalised[:, c] += alpha * own[:, image[0] : image[1]].sum(-1)
            else:
                penalised[:, c] -= (alpha * phi).float()
        beam_places = torch.tensor([smallest_mode(row) for row in location])
        summary = smallest_mode(beam_places)
        places.append(beam_places)
        history.append(
            dict(
                gen=gen,
                score=score,
                finished=list(finished),
                picks=picks,
                candidates=candidates,
                penalised=penalised,
            )
        )
        history = history[-window_size:]

        seen = torch.stack(places[-window_size:] if paper else places)
        often = [int((seen[:, b] == summary).sum()) for b in range(beams)]
        back = all(n >= threshold if paper else n > threshold for n in often) and summary >= earliest
        if paper and summary < latest:
            back = False
        if back:
            keep = summary + 1
            if made.get(keep, 0) >= most:
                keep = summary
                back = made.get(keep, 0) < most
            steps = max(t + 1 - keep, 2)
            back = back and (paper or summary + 1 < window_size) and steps <= len(history)
        if back and paper:
            old, after = history[-steps], history[-steps + 1]
            gone = {*rejected.get(keep, []), *after["picks"]}
            left = {
                (b, token)
                for b in range(beams)
                if old["score"][b] > -1e8
                for token in old["candidates"][b].tolist()
                if (b, token) not in gone
            }
            back = len(left) >= beams
        if back:
            made[keep] = made.get(keep, 0) + 1
            latest = max(latest, summary)
            old, after = history[-steps], history[-steps + 1]
            history = history[: len(history) - steps + 1]
            places = places[: len(places) - steps + 1]
            rejected.pop(keep + 1, None)
            rejected[keep] = [*rejected.get(keep, []), *after["picks"]]
            if log is not None:
                log.append((t, summary, keep))
            gen, score, finished = old["gen"], old["score"], old["finished"]
            logits, _ = forward(gen)
            if paper:
                table = torch.full((beams, width), -999.0).scatter(-1, old["candidates"], old["penalised"])
            else:
                table = logits - (999.0 + logits.min(-1, keepdim=True).values)
            for b, token in rejected[keep]:
                table[b, token] = -999.0
        else:
            table = torch.full((beams, width), -999.0).scatter(-1, candidates, penalised)

        total = table.log_softmax(-1) + score[:, None]
        top, where = total.flatten().topk(2 * beams)
        chosen = []
        for rank in range(2 * beams):
            beam, token = int(where[rank]) // width, int(where[rank]) % width
            if token == eos:
                if rank < beams:
                    offer(finished, gen[beam].tolist(), float(top[rank]))
            elif len(chosen) < beams:
                chosen.append((float(top[rank]), beam, token))
        length = counted + gen.shape[1] + 1
        done = len(finished) >= beams and min(v for v, _ in finished) >= float(top[0]) / length**length_penalty
        score = torch.tensor([s for s, _, _ in chosen])
        picks = [(b, token) for _, b, token in chosen]
        gen = torch.cat([gen[[b for b, _ in picks]], torch.tensor([[token] for _, token in picks])], 1)
    if not done:
        for b in range(beams):
            offer(finished, gen[b].tolist(), float(score[b]))
    best = sorted(finished, key=lambda item: item[0])[-1][1]
    return [*best, eos] if eos is not None and len(best) < max_new_tokens else best


def smallest_mode(values):
    values = [int(v) for v in values]
    most = max(values.count(v) for v in values)
    return min(v for v in values if values.count(v) == most)

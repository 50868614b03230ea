import random

from kvstore_engine.server.stop import StopStrings


def run(stops: list[str], pieces: list[str], include: bool = False) -> tuple[list[str], str | None]:
    """What comes out for each piece, the flushed rest last, and the stop string that was met."""
    strings = StopStrings(stops, include=include)
    out = [strings.push(piece) for piece in pieces]
    return [*out, strings.flush()], strings.matched


def test_without_stops_text_passes_through() -> None:
    assert run([], ["a", "b"]) == (["a", "b", ""], None)


def test_stop_inside_one_piece_cuts_it() -> None:
    assert run(["\n\n"], ["one\n\ntwo"]) == (["one", ""], "\n\n")


def test_stop_across_pieces_is_never_shown() -> None:
    assert run(["END"], ["go E", "N", "D more"]) == (["go ", "", "", ""], "END")


def test_what_only_looked_like_a_stop_comes_out() -> None:
    assert run(["END"], ["E", "N", "x"]) == (["", "", "ENx", ""], None)


def test_held_text_comes_out_at_the_end() -> None:
    assert run(["END"], ["the EN"]) == (["the ", "EN"], None)


def test_the_stop_that_is_complete_first_wins() -> None:
    assert run(["bcd", "c"], ["abcd"]) == (["ab", ""], "c")


def test_stop_may_be_part_of_the_text() -> None:
    assert run(["b"], ["abc"], include=True) == (["ab", ""], "b")


def test_nothing_comes_after_a_match() -> None:
    assert run(["b"], ["ab", "b", "c"]) == (["a", "", "", ""], "b")


def test_any_split_gives_the_text_before_the_first_stop() -> None:
    rng = random.Random(7)
    for _ in range(500):
        text = "".join(rng.choices("ab", k=rng.randint(0, 14)))
        stops = ["".join(rng.choices("ab", k=rng.randint(1, 4))) for _ in range(rng.randint(1, 3))]
        ends = [text.find(s) + len(s) for s in stops if s in text]
        pieces, at = [], 0
        while at < len(text):
            size = rng.randint(1, 3)
            pieces.append(text[at : at + size])
            at += size
        out, matched = run(stops, pieces)
        assert (matched is not None) == bool(ends), (text, stops)
        expected = text if matched is None else text[: min(ends) - len(matched)]
        if matched is None or sum(e == min(ends) for e in ends) == 1:
            assert "".join(out) == expected, (text, stops, pieces)

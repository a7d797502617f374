"""What docs/zipit.md says of zipping holds of one training: it keeps what averaging and permuting lose."""

from bench.zipit import HALVES, rows


def test_zipping_keeps_what_averaging_loses() -> None:
    found = rows(64, HALVES, seeds=1)
    ensemble, whole = found["the models' ensemble, all run"], found["zipped whole"]
    part, permuted, average = (
        found[name] for name in ("zipped up to the first hidden layer", "permuted only, beta 0", "plain average")
    )
    for number in range(2):  # over all ten digits; among each model's own
        assert whole[number] > max(permuted[number], average[number]) + 0.05
        assert part[number] > whole[number] - 0.02 and part[number] > ensemble[number] - 0.05

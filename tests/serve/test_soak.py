"""Some hundreds of requests with random adapters, cancellations and reloads (benchmarks/serving_soak.py: 10,000)."""

from benchmarks.serving_soak import LORAS, Soak


def test_every_answer_is_its_own_adapters(base, tmp_path):
    report = Soak(base, tmp_path, seed=1, loras=LORAS[::2]).run(400)
    assert (report["wrong"], report["first wrong"]) == (0, [])
    assert (report["leaked"], report["compiled after warm-up"]) == (0, 0)
    assert report["ends"]["length"] > 250
    assert min(report["ends"][what] for what in ("cancelled", "refused", "versions")) > 0
    assert report["counters"]["evictions"] > 0 and report["counters"]["cached_tokens"] > 0

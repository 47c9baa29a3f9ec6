from stages.distill.train import train


def test_it(shards, tmp_path, settings, objective, shape):
    events = []
    import time

    for stage in (3,):
        t = time.time()
        r = train(shards=shards, run=tmp_path, settings=settings, objective=objective, shape=shape, emit=events.append)
        print(r, time.time() - t)
        for e in events:
            print(e)
    import os

    print(os.listdir(tmp_path / "final_model"), os.listdir(tmp_path / "checkpoints"))

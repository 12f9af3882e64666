"""``tg-listen``: a sound sensor. It listens continuously and reports sounds.

    source -> ear (gate, ring buffer) -> queue -> questions -> outlets

A source (``sources.py``) brings blocks of samples; the ear (``ear.py``) keeps the last seconds of
them and cuts out what rises above the room; the queue has a bound and a stated policy; the model is
asked about each sound (``questions.py``); outlets carry what it answered: lines of JSON, MQTT, a
webhook, clips. ``service.py`` holds the threads. Nothing else in the runtime imports this package.
"""

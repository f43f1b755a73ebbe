"""The processes that share the work of one evaluation.

work.py     what is handed out: images to make, images to read
workers.py  processes that this one starts
worker.py   such a process
ranks.py    processes that a launcher started
sharing.py  which of them an evaluation has, and a source that carries them along
reading.py  images read by extractors and filters, divided among processes
"""

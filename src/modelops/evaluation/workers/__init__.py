"""Processes that share the work of one evaluation.

open.py      a source together with its workers
tasks.py     what is handed out: images to make, images to read
pool.py      processes that this one starts
process.py   such a process
ranks.py     processes that a launcher started
making.py    images of a share of the jobs
reading.py   images read by extractors and filters, divided among processes
threads.py   cores and GPUs of several processes
"""

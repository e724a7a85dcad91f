"""Files of prompts, whatever they are: found, opened, and read in parts.

sources.py    which files a source is     kinds.py      what kind of file a file is
part.py       the parts of a file         streams.py    compressed files and encodings
values.py     JSON of many lines          delimited.py  CSV
columnar.py   Parquet and Arrow           copies.py     copies for the import
"""

"""The report of a run: one self-contained HTML file (`page.py`) and its pictures (`plots.py`)."""

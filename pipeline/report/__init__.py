"""Runs into one page: ``pipeline report`` (D69).

::

    read.py      run folders -> studies of variants; says what is missing and which command makes it
    answer.py    what was asked, what came out, the table of all variants
    paper.py     the paper's numbers, and its tables with ours beside them
    insight.py   what the diagnostics say, in numbers and sentences
    cost.py      time, bytes, and operations against training without the cache
    figures.py   every picture, as SVG text
    videos.py    frame strips with the answers of every variant, like the paper's Figure 5
    build.py     all of it into templates/page.html

The page holds no script, loads nothing, and is the same bytes for the same input.
"""

"""placeholder"""

def write_comparison(out, result):
    return out / "report.html"

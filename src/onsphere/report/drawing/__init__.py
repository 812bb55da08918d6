"""How figures are drawn: panels, intervals, legends and colours, in matplotlib and SVG."""

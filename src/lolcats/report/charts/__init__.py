"""The charts of a report, in Vega-Lite by Altair; every function here needs the extra `report`."""

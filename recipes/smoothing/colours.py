"""Okabe and Ito's colours, told apart in every common kind of colour blindness, and a grey."""

BLACK, ORANGE, BLUE, GREEN, RED, PURPLE, GREY = (
    "#222222",
    "#E69F00",
    "#0072B2",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#999999",
)

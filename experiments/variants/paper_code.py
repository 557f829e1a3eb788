"""As the paper's code ran: position 0 has the ordinary constant;
end-of-text's is merged late; abrupt."""
taper_iters = 0
start_eot = 353

"""Where labelled images come from: one module for each kind of source, giving the samples one by one."""

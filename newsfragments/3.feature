As fast as the bare tools, with proof. GridFTP copies, listings and removals keep a hundred commands under way on their own
control channels; what fails is done again with care, and no file is ever taken for another. Elements of several jobs share a
batch, sized by the time they take, and an agent always has its next one at hand. An element that kills every daemon fails in
the end, large cancellations leave others their turn, and what an attempt did without being heard counts as done.
Progress of jobs (bytes proven and moving, files, rates, time left) in the API, the clients and ``pdm``; logs of running attempts
can be read (``?live=1``) and followed (``pdm logs -f``). Polls of a job are answered from memory, exactly; long answers begin at
once. ``script/bench`` measures every figure against the bare tool or a floor in the same run, checks that what was copied is
identical and logged, and makes the page of figures.
Limits of streams in all and by route, site, user and job; routes adapt to what they bear (``GET /routes``, ``pdm routes``); users have
weighted turns, and the helpers of those who take turns are kept.

Sites of users' own, in the database beside those of files: ``pdm site add | list | show | remove | check``, public or not, with several
endpoints a protocol chosen by load and health, limits, a MyProxy server and authorities that vouch for that site alone, also in
copies between two.
SSH, HTTPS (WebDAV with third-party copies, redirects of dCache and EOS) and XROOT beside GRIDFTP and FILE, each with all job
types; copies between unlike protocols go through the service. Movers can come as packages. What each protocol says of each fault is a table
made by the tests. A listing whose server dies in the middle is never taken for a whole one.
Credentials of several kinds: delegated proxies, logons at MyProxy servers (``pdm login``), SSH keys, tokens; sealed, listed
without secrets, taken back when removed. What has none that works is HELD, burns no attempt, and goes on by itself within
seconds of a new one; jobs that will outlast theirs say so.
Endpoints that cannot be reached are paused and probed and cost no attempts; operators drain sites and ban users with a message
that users see; who did what is in the audit log.
A threat model with a test for each line. Requests have a time to arrive, connections have limits, passwords cannot be tried, users' sites
do not lead to the service's own machine; certificates that cannot be read are refused in words; ``script/fuzz`` sends thousands of requests made from the OpenAPI document.

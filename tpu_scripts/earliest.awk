# Input: lines 'TIME HOST TEXT' of any number of hosts, those of one host in order. Output: the lines
# of the failure that began first, in the same form; with -v show=1 for a person.
{
  time = $1
  host = $2
  text = substr($0, length(time) + length(host) + 3)
  if (!(host in began)) {
    if (text !~ /^(Traceback \(most recent call last\)|Fatal Python error|jaxmods: |F[0-9][0-9][0-9][0-9] |terminate called)/)
      next
    began[host] = time
    sub(/Z$/, "", began[host]) # fractions of different length then compare as strings do
  } else if (text ~ /^[0-9][0-9]:[0-9][0-9]:[0-9][0-9] / || size[host] >= 100) {
    ended[host] = 1 # the log goes on
  }
  if (!(host in ended)) lines[host, ++size[host]] = time " " host " " text
}
END {
  for (host in began)
    if (first == "" || began[host] < began[first]) first = host
  if (first == "") {
    if (show) print "no failure in the logs"
    exit
  }
  if (show) print "earliest failure: " first ", " began[first]
  for (i = 1; i <= size[first]; i++) {
    text = lines[first, i]
    if (show) sub(/^[^ ]* [^ ]* ?/, "  ", text)
    print text
  }
}

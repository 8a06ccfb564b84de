# Does what its arguments say: what to do, from which attempt on it goes well, which attempt this is, what to answer.
what=$1 good_at=$2 attempt=$3 n=$4
if [ "$attempt" -ge "$good_at" ]; then what=answer; fi
case $what in
answer) printf %s "$n" ;;
fail) echo planned >&2; exit 3 ;;
retry) exit 75 ;;
ignore) exit 8 ;;
kill) kill -KILL $$ ;;
hang) exec sleep 1000 ;;
deaf) trap '' TERM; sleep 1000; sleep 1000 ;;
huge) head -c 100000 /dev/zero | tr '\0' x ;;
garbage) printf '{"\377' ;;
close) exec <&- >&- 2>&- ;;
fork) sleep 1000 & printf %s "$n" ;;
leave) setsid sleep 3 & printf %s "$n" ;;
gate)
    : > "$GATE/up-$n"
    while [ ! -e "$GATE/open" ]; do sleep 0.02; done
    printf %s "$n"
    ;;
esac

-- may end in: timeout instructions runtime ok
function reward(sample, ctx)
  if sample.completion == "bad" then
    do xpcall(error, function() error("again") end) while true do pcall(error) end end
  end
  if secret ~= nil or ctx.options.x ~= nil or sample.extra ~= nil then return -1 end
  return #sample.completion
end
